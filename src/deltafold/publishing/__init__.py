"""Archives and folded, merged or restored models on the Hugging Face Hub, each with its card."""
