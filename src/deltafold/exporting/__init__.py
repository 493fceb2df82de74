"""An archive becomes an adapter, and engines run many fine-tunes over one base."""
