"""`deltafold verify`."""

from __future__ import annotations

from typing import Any

from deltafold.cli.command import command
from deltafold.restoring.request import VerifyRequest


def _show(found: dict[str, Any], request: VerifyRequest) -> None:
    from rich.markup import escape

    from deltafold.cli.show import duration, say

    archive, base = request.archive, request.base
    say(
        f"{archive}: all parts of {found['tensors_checked']} tensors and {found['files_checked']} "
        "small files are whole"
    )
    if unchecked := found["files_unchecked"]:
        say(
            f"  not checked: {escape(', '.join(unchecked))}, stored relative to the base's; an archive "
            "of this older format has no digest of it, so give --base"
        )
    if strangers := found["strangers"]:
        say(f"  not part of the archive: {escape(', '.join(strangers))}; remove it")
    if base is None:
        say("  give --base to check that everything decodes")
    else:
        say(
            f"  {base} is its base; {found['tensors_decoded']} tensors decode, "
            f"{found['tensors_exact']} of them equal the fine-tune bit for bit"
        )
    if found["relative_error"] is not None:
        say(f"  relative error of the restored delta: {found['relative_error']:.4f}")
    say(f"  {duration(found['seconds'])}")


verify = command(VerifyRequest, "deltafold.restoring.verify:run_verify", _show)
