"""Base, fine-tune and what an archive restores, asked the same thing."""

from deltafold.comparing.trio import Answer, Trio

__all__ = ["Answer", "Trio"]
