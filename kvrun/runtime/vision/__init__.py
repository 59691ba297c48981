"""JOB: pixels -> embeddings. Towers are ordinary Blocks; image processors are transformers' own.

A file of `towers` is named as the `model_type` of a model that sees images, and has
`build(w) -> Vision`.
"""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from kvrun.runtime.image import Image
    from kvrun.runtime.text.places import Places


class Vision(Protocol):
    """The part of a model that sees. `places` says where its features go, which have `hidden`
    values each."""

    hidden: int

    @property
    def places(self) -> "Places": ...

    def __call__(self, image: "Image") -> "torch.Tensor":
        """The features [places.count(image), hidden] that stand for an image in the text."""

    def largest(self) -> "Image":
        """An empty image of the largest size, to see what one takes of memory."""
