"""Skin lesions: an image and a question, reasoning, and the name of the disease. Start reading at `recognition.py`."""

from lit_agentrl.envs.dermatology.samples import ImageSource, Sample, file_image

__all__ = ["ImageSource", "Sample", "file_image"]
