"""Fine-tuning (arXiv:2509.19082): data, recipe, synthetic videos, and the small model that is trained on them."""
