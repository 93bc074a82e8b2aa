"""The options of a training job."""
