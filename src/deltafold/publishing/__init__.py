"""Archives and folded, merged or restored models on the Hugging Face Hub, each with its card."""

from deltafold.publishing.push import push_to_hub

__all__ = ["push_to_hub"]
