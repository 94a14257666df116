"""TurboQuant for Hugging Face transformers."""
