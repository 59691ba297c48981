"""What a weight says of its neighbours where its product stands by itself."""


class Unfused:
    """A weight whose `matmul` knows no prologues and no epilogues."""

    def takes_in(self, rows: int) -> bool:
        return False

    def gates(self, rows: int) -> bool:
        return False
