"""`deltafold merge`."""

from __future__ import annotations

from typing import Any

from deltafold.cli.command import Extras, command, record_place
from deltafold.cli.method_settings import METHOD_SETTINGS, with_method_settings
from deltafold.merging.request import MergeRequest


def _show(record: dict[str, Any], request: MergeRequest) -> None:
    from deltafold.cli.merge_summary import show

    show(record, None if request.dry_run else record_place(request.record, request.output))


merge = command(
    MergeRequest,
    "deltafold.merging.choosing:run_merge",
    _show,
    extras=Extras(with_method_settings, [METHOD_SETTINGS["setting"]]),
)
