"""The order in which a request's pages fill, on the host: the oracle of `PageHeap.take_pages`."""


class PageCursor:
    """Hands out a request's pages in the order in which they fill."""

    def __init__(self, heap_block_ids: list[int], first_page: int, pages_per_block: int) -> None:
        self.num_pages = first_page
        self._block_ids = heap_block_ids
        self._pages_per_block = pages_per_block

    def take(self, num_pages: int) -> list[int]:
        """The ids of the next `num_pages` pages.

        Raises:
            IndexError: The scheduler's reserve was too small.
        """
        pages = range(self.num_pages, self.num_pages + num_pages)
        self.num_pages += num_pages
        per_block = self._pages_per_block
        return [self._block_ids[i // per_block] * per_block + i % per_block for i in pages]
