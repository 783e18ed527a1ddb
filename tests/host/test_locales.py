"""The pack's words in every language: nothing missing, nothing stale, and what must not be translated left alone.

`locales/LANGUAGE.json` is written by hand: English phrase to translation. `locales/LANGUAGE/main.json`, which ComfyUI serves,
is made from it and from the node definitions: `ATTUNE_WRITE=1 python dev.py test tests/host/test_locales.py`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

LOCALES = Path(__file__).resolve().parents[2] / "locales"
BOOKS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(LOCALES.glob("*.json"))}
SECTIONS = ("menu", "nodes", "names", "texts")  # categories; titles; inputs and outputs; descriptions and tooltips
SYNTAX = set("{}@|<>")  # the page would read these as placeholders, links, plurals or markup


def english(schemas) -> dict:
    """The definitions of our nodes as the page's translations name them: {id: {display_name, description, ...}}."""
    key = lambda name: name.replace(".", "_")
    return {
        node: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {
                key(one.id): {"name": one.display_name or one.id, "tooltip": one.tooltip} for one in schema.inputs
            },
            "outputs": {
                str(i): {"name": one.display_name or one.io_type, "tooltip": one.tooltip}
                for i, one in enumerate(schema.outputs)
            },
        }
        for node, schema in schemas.items()
    }


def sockets(node: dict) -> list[dict]:
    return [*node["inputs"].values(), *node["outputs"].values()]


def phrases(schemas) -> dict[str, list[str]]:
    """Every English phrase, by section of the phrase book, once and in menu order."""
    nodes = english(schemas).values()
    found = {
        "menu": [part for schema in schemas.values() for part in schema.category.split("/")],
        "nodes": [node["display_name"] for node in nodes],
        "names": [socket["name"] for node in nodes for socket in sockets(node)],
        "texts": [
            text for node in nodes for text in (node["description"], *(socket["tooltip"] for socket in sockets(node)))
        ],
    }
    return {section: list(dict.fromkeys(found[section])) for section in SECTIONS}


def served(schemas, book: dict) -> dict[str, dict]:
    """What the file of one language holds. Without a book: English. ComfyUI reads a key of main.json as it reads the file
    of that name beside it."""
    say = lambda section, phrase: book[section][phrase] if book else phrase
    spoken = lambda socket: {"name": say("names", socket["name"]), "tooltip": say("texts", socket["tooltip"])}
    definitions = {
        name: {
            "display_name": say("nodes", node["display_name"]),
            "description": say("texts", node["description"]),
            "inputs": {key: spoken(socket) for key, socket in node["inputs"].items()},
            "outputs": {key: spoken(socket) for key, socket in node["outputs"].items()},
        }
        for name, node in english(schemas).items()
    }
    menu = {part: say("menu", part) for part in phrases(schemas)["menu"]}
    return {"nodeCategories": menu, "nodeDefs": definitions}


@pytest.fixture(scope="module")
def schemas(host):
    from pack.nodes.extension import NODES

    return {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in NODES}


def test_the_languages_are_those_promised():
    assert set(BOOKS) == {"de", "es", "fr", "ja", "ko", "pt-BR", "ru", "zh", "zh-TW"}  # as the page names them
    assert {path.name for path in LOCALES.iterdir() if path.is_dir()} == {"en", *BOOKS}


@pytest.mark.parametrize("language", BOOKS)
def test_every_phrase_has_its_translation_and_no_translation_lost_its_phrase(schemas, language):
    wanted, book = phrases(schemas), BOOKS[language]
    missing = {s: {phrase: "" for phrase in wanted[s] if not book[s].get(phrase, "").strip()} for s in SECTIONS}
    stale = {s: [phrase for phrase in book[s] if phrase not in wanted[s]] for s in SECTIONS}
    say = lambda found: json.dumps(
        {s: entries for s, entries in found.items() if entries}, ensure_ascii=False, indent=1
    )
    if any(missing.values()):
        pytest.fail(f"Translate these in locales/{language}.json: {say(missing)}", pytrace=False)
    if any(stale.values()):
        pytest.fail(
            f"No node says these any more; remove them from locales/{language}.json: {say(stale)}", pytrace=False
        )


@pytest.mark.parametrize("language", ["en", *BOOKS])
def test_what_comfyui_serves_is_made_from_the_nodes_and_the_phrase_book(schemas, language):
    path = LOCALES / language / "main.json"
    text = json.dumps(served(schemas, BOOKS.get(language, {})), ensure_ascii=False, indent=1) + "\n"
    if os.environ.get("ATTUNE_WRITE"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    assert path.read_text("utf-8") == text, f"{path} is stale: run this file with ATTUNE_WRITE=1"


@pytest.mark.parametrize("language", BOOKS)
def test_titles_are_told_apart_and_inputs_of_one_node_too(schemas, language):
    nodes = served(schemas, BOOKS[language])["nodeDefs"]
    assert max(Counter(node["display_name"] for node in nodes.values()).values()) == 1
    for name, node in nodes.items():
        names = Counter(socket["name"] for socket in node["inputs"].values())
        assert max(names.values()) == 1, (name, names)


SCRIPTS = {  # letters that a text of this language cannot do without
    "ja": "[\u3040-\u30ff\u4e00-\u9fff]",
    "ko": "[\uac00-\ud7a3]",
    "ru": "[\u0400-\u04ff]",
    "zh": "[\u4e00-\u9fff]",
    "zh-TW": "[\u4e00-\u9fff]",
}


@pytest.mark.parametrize("language", BOOKS)
def test_every_text_is_written_in_its_language(language):
    letters = re.compile(SCRIPTS.get(language, "."))
    texts = BOOKS[language]["texts"]
    assert [said for text, said in texts.items() if said == text or not letters.search(said)] == []


RIVALS = {  # words of a language for what the book calls by another one throughout
    "de": ["rauschstufe", "knoten"],
    "es": ["muestreador", "calendario", "según se publicó", "como se publicó"],
    "fr": ["échantillonneur", "calendrier", "graine", " node ", "passage court", "passage long"],
    "ja": ["計測", "校正", "絵"],
    "ru": ["картинк", "вызов"],
    "zh": ["噪声", "图片", "忠实度", "级别"],
}


@pytest.mark.parametrize("language", RIVALS)
def test_a_thing_has_one_name_in_a_language(language):
    texts = BOOKS[language]["texts"].values()
    assert [said for said in texts if any(word in said.lower() for word in RIVALS[language])] == []


def kept(text: str, options: list[str], book: dict) -> list[str]:
    """What a translation of `text` must hold: names as this language shows them; options, folders, endings as they are."""
    found = [option for option in options if f"{option}:" in text or f"'{option}'" in text]
    found += re.findall(r"\b(?:models|output)/\w+|\.[a-z]{3,}\b", text)
    found += [book["names"].get(quoted, quoted) for quoted in re.findall(r"'(\w+)'", text)]
    for title in sorted(
        book["nodes"], key=len, reverse=True
    ):  # "Attune Golden Noise Model" is not "Attune Golden Noise"
        if title in text:
            found.append(book["nodes"][title])
            text = text.replace(title, "")
    return found


@pytest.mark.parametrize("language", BOOKS)
def test_every_text_keeps_its_numbers_options_and_the_names_on_screen(schemas, language):
    book, wrong = BOOKS[language], []
    for schema in schemas.values():
        for one in [None, *schema.inputs, *schema.outputs]:
            text = one.tooltip if one else schema.description
            translation = book["texts"][text]
            options = [str(option) for option in getattr(one, "options", None) or []]
            wrong += [
                f"{word!r} is not in {translation!r}" for word in kept(text, options, book) if word not in translation
            ]
            lost, added = numbers(text) - numbers(translation), numbers(translation) - numbers(text)
            if lost or any(len(number) > 1 for number in added):  # "one picture" may well become "1 枚"
                wrong.append(f"The numbers of {text!r} are not those of {translation!r}")
    assert not wrong, "\n".join(dict.fromkeys(wrong))


def numbers(text: str) -> Counter:
    """The digits of a text, however the language points them, but not those of names such as SD3 and img2img."""
    return Counter(re.findall(r"(?<![A-Za-z\d])\d+(?![A-Za-z\d])", re.sub(r"(?<=\d)[.,\u202f\u00a0](?=\d)", "", text)))


@pytest.mark.parametrize("language", ["en", *BOOKS])
def test_no_phrase_holds_what_the_page_reads_as_syntax(schemas, language):
    for content in served(schemas, BOOKS.get(language, {})).values():
        spoken = [value for value in strings(content) if SYNTAX & set(value)]
        assert spoken == []


def strings(content):
    if isinstance(content, str):
        yield content
    else:
        for value in content.values():
            yield from strings(value)
