"""The paper's benchmarks: data sets, J&F, runs that stop and resume, submissions, reports."""
