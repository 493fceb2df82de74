"""An archive read: decoded, restored, verified, inspected, loaded."""
