"""A run as a page: one HTML file that needs no network, filled from the record.

`page.html`, `page.css` and `page.js` are the page; what it shows of a record is a `View`, made by a
function a kind of record (`VIEWS`). A kind without one is shown by its tables.
"""

from deltafold.reporting.page.writing import page_html, write_page

__all__ = ["page_html", "write_page"]
