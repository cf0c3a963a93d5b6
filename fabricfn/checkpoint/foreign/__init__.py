"""What other tools wrote: PyTorch files, safetensors, Hugging Face folders, torch's distributed checkpoints."""
