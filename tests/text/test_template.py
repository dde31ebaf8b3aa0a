"""Messages are rendered to the same text as in transformers."""

from __future__ import annotations

import dataclasses
import enum
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, CHATS, QWEN3, TEMPLATES, TOOL, rendered, reply, user
from tiny_tokenizers import write_folder

from tinychat_mlx.base.errors import TokenizerError
from tinychat_mlx.text.chat_template import ChatTemplate
from tinychat_mlx.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("template"), "llama2")


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="session")
def other(folder: Path) -> Any:
    return theirs(folder)


def outcome(render: Any, chat: list[dict[str, Any]], **options: Any) -> str | None:
    """Return the rendered text, or None if it was refused."""
    import jinja2

    try:
        return str(render(chat, **options))
    except (TokenizerError, jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError):
        return None


# -- equal to transformers


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_text_equals_transformers(name: str, chat: str, folder: Path, other: Any) -> None:
    mine = Tokenizer.load(folder, chat_template=TEMPLATES[name])
    options: list[dict[str, Any]] = [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "tools": [TOOL], "enable_thinking": False},
        {
            "add_generation_prompt": True,
            "tools": [],
            "documents": [{"title": "t", "text": "x"}],
            "custom": "c",
        },
        {"add_generation_prompt": False, "continue_final_message": True},
        {"add_generation_prompt": True, "bos_token": "<B>", "date_string": "1 Jan 1970"},
    ]
    for option in options:
        if name == "corners" and "continue_final_message" in option:
            continue  # it shows the last message twice, with transformers' mark inside
        expected = outcome(
            other.apply_chat_template, CHATS[chat], chat_template=TEMPLATES[name], tokenize=False, **option
        )
        assert outcome(mine.render, CHATS[chat], **option) == expected, option


def test_the_comparison_sees_texts_and_refusals(folder: Path) -> None:
    """The test above would pass if everything were refused, so most must render and some must not."""
    texts: dict[tuple[str, str], str | None] = {}
    for name in ("mistral", "qwen3", "llama3"):
        mine = Tokenizer.load(folder, chat_template=TEMPLATES[name])
        texts |= {(name, chat): outcome(mine.render, CHATS[chat]) for chat in CHATS}
    assert texts["mistral", "twice user"] is texts["llama3", "two calls"] is None
    assert sum(text is not None for text in texts.values()) > 35


def test_a_reasoning_field_can_be_continued(folder: Path, other: Any) -> None:
    template = (
        "{% for m in messages %}<think>{{ m.reasoning_content or '' }}</think>{{ m.content }}{% endfor %}"
    )
    chat = [user("q"), reply("", thinking="I wonder ")]
    mine = Tokenizer.load(folder, chat_template=template)
    for field in ("reasoning_content", "thinking", "reasoning"):
        option = {"add_generation_prompt": False, "continue_final_message": field}
        expected = outcome(other.apply_chat_template, chat, chat_template=template, tokenize=False, **option)
        assert outcome(mine.render, chat, **option) == expected
    assert mine.render(chat, continue_final_message="thinking") == "<think></think>q<think>I wonder "


def test_continuing_switches_the_generation_prompt_off(folder: Path) -> None:
    mine = Tokenizer.load(folder, chat_template=CHATML)
    assert mine.render([user("a"), reply("b ")], continue_final_message=True).endswith("assistant\nb ")


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([user("a"), reply(None)], "no 'content'"),
        ([user([{"type": "image"}])], "no text"),
        ([user(3)], "no text"),
    ],
)
def test_nothing_to_continue_is_said(folder: Path, chat: list[dict[str, Any]], words: str) -> None:
    mine = Tokenizer.load(folder, chat_template=QWEN3)
    with pytest.raises(TokenizerError, match=words):
        mine.render(chat, continue_final_message=True)


def test_rich_objects_reach_the_template_as_plain_values(folder: Path, other: Any) -> None:
    numpy = pytest.importorskip("numpy")

    class Colour(str, enum.Enum):
        RED = "red"

    class Image:
        def save(self, path: str) -> str:
            raise AssertionError("the template called a method")

    @dataclasses.dataclass
    class Part:
        text: str
        n: Any

    class Model:
        def model_dump(self) -> dict[str, Any]:
            return {"x": Colour.RED, "image": Image()}

    template = "{{ messages[0] | tojson }}{{ thing }}{{ thing.save is defined }}{{ flag is true }}{{ kept }}"
    chat = [user([Part("a", numpy.float64(0.5)), Model(), Colour.RED, (1, 2), numpy.arange(2), Image, b"b"])]
    values = {"thing": Image(), "flag": numpy.bool_(True), "kept": numpy.int64(3)}
    mine = Tokenizer.load(folder, chat_template=template).render(chat, **values)
    assert mine == other.apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=True, **values
    )
    assert "<Image>" in mine and "False" in mine


def test_messages_of_the_caller_are_left_alone(folder: Path) -> None:
    chat = [user([{"type": "text", "text": "a"}]), reply("b", reasoning="r", name=None)]
    before = json.dumps(chat)
    mine = Tokenizer.load(folder, chat_template=QWEN3)
    mine.render(chat)
    mine.render(chat, continue_final_message=True)
    assert json.dumps(chat) == before


# -- sources of the template


def test_the_nearest_template_wins(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "llama2")
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer.load(folder).render([user("a")])

    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert Tokenizer.load(folder).render([user("a")]) == "old"

    write_folder(folder, "llama2", chat_template="config")
    assert Tokenizer.load(folder).render([user("a")]) == "config"
    assert theirs(folder).apply_chat_template([user("a")], tokenize=False) == "config"

    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(folder).render([user("a")]) == "file"
    assert theirs(folder).apply_chat_template([user("a")], tokenize=False) == "file"

    assert Tokenizer.load(folder, chat_template="given").render([user("a")]) == "given"


@pytest.mark.parametrize("spelling", ["list", "dict", "files"])
def test_named_templates_are_chosen_as_transformers_does(tmp_path: Path, spelling: str) -> None:
    named = {"default": "D", "tool_use": "T", "rag": "R"}
    as_list = [{"name": name, "template": text} for name, text in named.items()]
    folder = write_folder(tmp_path, "llama2", chat_template=as_list if spelling == "list" else named)
    if spelling == "files":
        (folder / "chat_template.jinja").write_text("D")
        (folder / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(named[name])
    mine, other = Tokenizer.load(folder), theirs(folder)
    for tools in (None, [], [TOOL]):
        assert mine.render([user("a")], tools=tools) == other.apply_chat_template(
            [user("a")], tools=tools, tokenize=False
        )


def test_named_templates_without_a_default_are_not_guessed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "llama2", chat_template=[{"name": "rag", "template": "R"}])
    with pytest.raises(TokenizerError, match=r"no template named 'default', only rag"):
        Tokenizer.load(folder).render([user("a")])


@pytest.mark.parametrize("damage", [b"{", b"[1]", b"\xff\xfe", b'{"chat_template": 3}', b"{}"])
def test_a_damaged_template_file_is_named(tmp_path: Path, damage: bytes) -> None:
    folder = write_folder(tmp_path, "llama2")
    (folder / "chat_template.json").write_bytes(damage)
    with pytest.raises(TokenizerError, match=r"chat_template\.json"):
        Tokenizer.load(folder)


# -- errors in one line


def test_the_templates_own_words_reach_the_user() -> None:
    with pytest.raises(
        TokenizerError,
        match=r"^chat_template\.jinja: the chat template refuses the messages: roles must alternate —",
    ):
        rendered("{{ raise_exception('roles must\n alternate') }}")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a\nb{% for %}", "line 2"),
        ("{% if x %}", "line 1"),
        ("{{ x | nosuchfilter }}", "nosuchfilter"),
        ("{{ nothing.attribute }}", "nothing"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ messages[0].content() }}", "not callable"),
        ("{% include 'other' %}", "loader"),
        ("{{ strftime_now(3) }}", "TypeError"),
    ],
)
def test_a_broken_template_is_an_error_with_its_reason(source: str, words: str) -> None:
    with pytest.raises(TokenizerError, match=words) as error:
        rendered(source)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no message"),
        (["text"], "message 0: str is"),
        ([user("a"), 3], "message 1: int is"),
        ([user(DEEP)], "nested"),
    ],
)
def test_messages_of_a_wrong_form_are_refused(messages: Any, words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        rendered("x", messages)


@pytest.mark.parametrize("option", ["tools", "documents"])
def test_tools_and_documents_are_objects(option: str) -> None:
    with pytest.raises(TokenizerError, match="0: str is not a JSON object"):
        rendered("x", **{option: ["add"]})


def test_variables_cannot_replace_what_renders() -> None:
    """CVE-2025-62426: a request overrode the renderer's arguments. Here they are only variables."""
    variables: dict[str, Any] = {
        "chat_template": "evil",
        "tokenize": True,
        "raise_exception": "x",
        "messages": [],
        "self": 1,
    }
    source = "{{ messages[0].content }}{{ chat_template }}{{ bos_token }}"
    template = ChatTemplate({"default": source}, "chat_template.jinja", {"bos_token": "<s>"})
    assert template.render([user("Hi")], **variables) == "Hievil<s>"


def test_threads_share_a_template(folder: Path) -> None:
    mine = Tokenizer.load(folder, chat_template=QWEN3)
    expected = {n: Tokenizer.load(folder, chat_template=QWEN3).render([user(str(n))]) for n in range(8)}
    got: dict[int, set[str]] = {n: set() for n in range(8)}

    def work(n: int) -> None:
        for _ in range(20):
            got[n].add(mine.render([user(str(n))]))

    threads = [threading.Thread(target=work, args=(n,)) for n in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {n: {text} for n, text in expected.items()}
