"""What a product that stands by itself says of its neighbours."""


class Apart:
    """A weight whose `matmul` takes in nothing of what comes before it or behind it."""

    def takes_in(self, rows: int) -> bool:
        return False

    def gates(self, rows: int) -> bool:
        return False
