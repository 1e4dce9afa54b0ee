"""What names a place on the Hub, told from the text alone; the client's own parser agrees."""

import pytest
from huggingface_hub import parse_hf_uri
from huggingface_hub.errors import HfUriError

from loramerge.errors import UsageError
from loramerge.io._reference import HubReference, hub_reference

ADDRESSES = [
    "hf://a/b",
    "hf://models/a/b@main/x/y.safetensors",
    "hf://a/b@refs/pr/3/x",
    "hf://a/b@refs/convert/parquet",
    "hf://a/b@feature%2Ffoo/x",
    "hf://a/b/file@1.safetensors",
    "hf://a/b/folder/",
    "https://huggingface.co/a/b",
    "https://hf.co/a/b/",
    "huggingface.co/a/b/tree/main/sub",
    "https://huggingface.co/a/b/tree",
    "https://huggingface.co/models/a/b",
    "https://huggingface.co/a/b/blob/main/sub%20x/y.safetensors?download=true",
    "https://huggingface.co/a/b/resolve/feature%2Ffoo/x.safetensors",
    "https://huggingface.co/a/b/resolve/refs%2Fpr%2F1/x.safetensors",
]
NO_ADDRESSES = [
    "hf://",
    "hf://a",
    "hf://a/b@",
    "hf://a/b//c",
    "https://huggingface.co/a",
    "https://huggingface.co/a/b/discussions/3",
    "https://civitai.com/models/1/2",
]


@pytest.mark.parametrize("text", ADDRESSES)
def test_an_address_means_what_the_client_takes_it_for(text: str) -> None:
    theirs = parse_hf_uri(text)
    assert hub_reference(text) == HubReference(theirs.id, theirs.revision, theirs.path_in_repo)


@pytest.mark.parametrize("text", NO_ADDRESSES)
def test_what_the_client_takes_for_no_address_is_refused(text: str) -> None:
    with pytest.raises(HfUriError):
        parse_hf_uri(text)
    with pytest.raises(UsageError) as refused:
        hub_reference(text)
    assert refused.value.hint


@pytest.mark.parametrize("kind", ["datasets", "spaces", "buckets"])
def test_what_is_not_a_model_is_refused_by_its_kind(kind: str) -> None:
    for text in (f"hf://{kind}/a/b", f"https://huggingface.co/{kind}/a/b"):
        with pytest.raises(UsageError, match=f"is in the Hub's {kind}"):
            hub_reference(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user/repo", HubReference("user/repo")),
        ("user/repo@v1.0", HubReference("user/repo", "v1.0")),
        ("user/repo@feature/foo", HubReference("user/repo", "feature/foo")),
        ("user/repo@refs/pr/3:sub", HubReference("user/repo", "refs/pr/3", "sub")),
        ("user/repo:sub/x.safetensors", HubReference("user/repo", None, "sub/x.safetensors")),
        ("user/repo.safetensors:sub/", HubReference("user/repo.safetensors", None, "sub")),
        ("User_1/My.Lora-v2", HubReference("User_1/My.Lora-v2")),
    ],
)
def test_the_short_forms(text: str, expected: HubReference) -> None:
    assert hub_reference(text) == expected


@pytest.mark.parametrize("text", ["user/repo", "user/repo@v1", "user/repo:a/b", "user/repo@v1:a"])
def test_a_short_form_is_what_is_shown_again(text: str) -> None:
    assert str(hub_reference(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "./user/repo",
        "../user/repo",
        "/user/repo",
        "~/repo",
        "user/repo.safetensors",
        "user/repo@main.safetensors",
        "a/b/c",
        "a\\b",
        "user/",
        "naïve/repo",
        "",
    ],
)
def test_all_else_is_a_path(text: str) -> None:
    assert hub_reference(text) is None


def test_pages_of_another_hub_are_known_by_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/hf")
    page = "https://hub.example/hf/a/b/tree/main/sub"
    assert hub_reference(page) == HubReference("a/b", "main", "sub")
    theirs = parse_hf_uri(page, endpoint="https://hub.example/hf")
    assert (theirs.id, theirs.revision, theirs.path_in_repo) == ("a/b", "main", "sub")
