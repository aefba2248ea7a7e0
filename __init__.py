"""Sa2VA-i: say what to find in a video, get its masks (arXiv:2509.19082)."""

from .configuration_sa2va_i import Sa2VAiConfig
from .loading import load
from .modeling_sa2va_i import Sa2VAiModel, VideoSegmentation
from .processing_sa2va_i import Sa2VAiProcessor
from .sam2_propagator import Sam2Propagator

__all__ = ["Sa2VAiConfig", "Sa2VAiModel", "Sa2VAiProcessor", "Sam2Propagator", "VideoSegmentation", "load"]
