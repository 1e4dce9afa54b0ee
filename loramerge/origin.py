"""Where on the Hub an adapter comes from, and the names that follow from it."""

from msgspec import Struct

__all__ = ["Origin"]


class Origin(Struct, frozen=True):
    """Where on the Hub an adapter comes from: repository, commit, path of its weights file.

    `sha256` is the weights file's, where the Hub states it; `tokenizer` are the names of a
    tokenizer's files beside it.
    """

    repository: str
    revision: str
    path: str
    sha256: str | None = None
    tokenizer: tuple[str, ...] = ()

    @property
    def uri(self) -> str:
        """The reference that means this very file for ever: hf://user/repo@commit/path."""
        return f"hf://{self.repository}@{self.revision}/{self.path}"

    @property
    def pinned(self) -> str:
        """What to type for this very file: user/repo@commit or user/repo@commit:place."""
        return f"{self.repository}@{self.revision}" + (f":{self.place}" if self.place else "")

    @property
    def place(self) -> str:
        """What follows a colon to name it: a folder, or a file under another name than PEFT's."""
        return self.path.removesuffix("adapter_model.safetensors").rstrip("/")

    @property
    def stem(self) -> str:
        """What results and copies are called after: a file or folder that was meant, or the repo.

        The names that every trainer gives its file say nothing.
        """
        place = self.place.removesuffix("pytorch_lora_weights.safetensors").rstrip("/")
        return (place or self.repository).rpartition("/")[2].removesuffix(".safetensors")

    @property
    def name(self) -> str:
        """How people call it: user/repo or user/repo:place."""
        return self.repository + (f":{self.place}" if self.place else "")
