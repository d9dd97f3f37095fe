from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llmfw.engine.chat_template import render
from llmfw.engine.tokenizer import Tokenizer, load_tokenizer
from llmfw.errors import RequestError, TokenizerError
from tiny_tokenizer import TEMPLATE, tiny_backend, write_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_text_there_and_back(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, bos=True))
    ids = tokenizer.encode("Hello")
    assert ids[0] == tokenizer.bos_token_id == 95
    assert tokenizer.eos_token_id == 96
    assert tokenizer.vocab_size == 97
    assert tokenizer.encode("Hello", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == "Hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>Hello"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    backend = tiny_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("Hello")) == 5


def test_chat_template(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(MESSAGES) == "<|user|>Hi</s>\n<|assistant|>"
    assert (
        tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False) == "<|user|>Hi</s>\n"
    )
    own = "{{ bos_token }}{{ messages[0].content }}{{ mood }}"
    text = tokenizer.apply_chat_template(MESSAGES, chat_template_text=own, mood="!")
    assert text == "<s>Hi!"


def test_templates_in_files_and_lists(tmp_path):
    named = [
        {"name": "default", "template": "D"},
        {"name": "tool_use", "template": "T{{ tools|length }}"},
    ]
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, chat_template=named))
    assert tokenizer.apply_chat_template(MESSAGES) == "D"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{"name": "f"}]) == "T1"
    (tmp_path / "chat_template.jinja").write_text(
        "file {{ messages[0].content }}", encoding="utf-8"
    )
    assert load_tokenizer(tmp_path).apply_chat_template(MESSAGES) == "file Hi"


def test_no_template_and_wrong_messages(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, chat_template=None))
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template(MESSAGES)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    for wrong in ([], "Hi", ["Hi"], [{"content": "Hi"}], None):
        with pytest.raises(RequestError, match="messages must be"):
            tokenizer.apply_chat_template(wrong)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
        ("{{ {'a': 'é<'} | tojson(indent=1) }}", '{\n "a": "é<"\n}'),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
        ("{% for x in [1, 2] %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "2"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{% if true %}\n  a\n{% endif %}\n", "  a\n"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
    ],
)
def test_extensions_that_templates_use(template, text):
    assert render(template, MESSAGES) == text


def test_templates_against_transformers():
    from transformers.utils.chat_template_utils import render_jinja_template

    templates = [
        TEMPLATE.replace("eos_token", "'</s>'"),
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}\n"
        "{{- m.role ~ ns.n }} {{ m['content'] | trim }}\n{%- endfor -%}\n{{ messages | tojson }}",
    ]
    for template in templates:
        theirs, _ = render_jinja_template(
            [MESSAGES], chat_template=template, add_generation_prompt=True
        )
        assert render(template, MESSAGES) == theirs[0]


def test_template_that_refuses_or_is_broken():
    with pytest.raises(RequestError, match="only user messages"):
        render("{{ raise_exception('only user messages') }}", MESSAGES)
    with pytest.raises(TokenizerError, match="cannot be read"):
        render("{% if %}", MESSAGES)


def test_template_runs_in_a_sandbox():
    for attack in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ):
        with pytest.raises(RequestError, match="refuses"):
            render(attack, [*MESSAGES])


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert "skip_tokenizer_init" in caught.value.hint
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(TokenizerError, match="not a JSON object"):
        load_tokenizer(tmp_path)


def test_special_tokens_map_fills_what_the_config_leaves_out(tmp_path):
    write_tokenizer(tmp_path, eos_token=None)
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "</s>"}), encoding="utf-8"
    )
    assert load_tokenizer(tmp_path).eos_token_id == 96
    assert Tokenizer(tiny_backend()).eos_token_id is None


def test_older_files_are_converted_by_transformers(tmp_path):
    vocab = tiny_backend().get_vocab(with_added_tokens=False)
    (tmp_path / "vocab.json").write_text(
        json.dumps({**vocab, "<|endoftext|>": 95}), encoding="utf-8"
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    assert tokenizer.eos_token_id == 95


def test_needs_no_transformers(tmp_path):
    write_tokenizer(tmp_path)
    code = (
        "import sys; from llmfw.engine.tokenizer import load_tokenizer\n"
        f"t = load_tokenizer({str(tmp_path)!r})\n"
        "t.apply_chat_template([{'role': 'user', 'content': 'x'}])\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
