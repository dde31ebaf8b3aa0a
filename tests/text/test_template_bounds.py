"""A chat template cannot leave its sandbox, and cannot take much time or memory."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from chat_templates import rendered, user
from counting import Clock

from tinychat_mlx.base.errors import TokenizerError

# -- escapes


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages.__class__.__base__ }}",
    "{{ messages[0].__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__['__builtins__'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__class__ }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ dict.mro() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ strftime_now.__code__ }}",
    "{{ range.__class__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format_map({'0': 1}) }}",
    "{{ ('{0.__class__}' | attr('format'))(messages) }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
    "{{ ['{0.__class__}'] | map('format', 1) | list }}{{ '{0.__class__}' | map(attribute='__class__') | list }}",
    "{{ messages | map(attribute='__class__') | list | first }}",
    "{{ messages | groupby('__class__') | first }}",
    "{{ messages | sort(attribute='__class__') | map(attribute='__init__') | list | first | attr('__globals__') }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update(x=1) }}",
    "{{ messages[0].pop('content') }}",
    "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}{{ ns }}",
    "{{ namespace({'__class__': 1}) }}",
    "{% for x in (messages | map('items')) %}{{ x.gi_frame.f_globals }}{% endfor %}",
    "{{ (messages | map('list')).gi_frame.f_back.f_builtins }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{{ loop.__init__ }}{% for a in messages %}{{ loop._iterator.__reduce__() }}{% endfor %}",
    "{{ environment.globals }}{{ context.environment.globals['x'].y }}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends messages[0].content %}",
    "{{ self.tick.__globals__ }}{{ tick() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_reaches_nothing_outside(source: str) -> None:
    """Refused, or the unsafe attribute is undefined: no class, module, function body or frame is visible."""
    messages = [user("Hi")]
    try:
        text = rendered(source, messages)
    except TokenizerError:
        text = ""
    assert not any(
        word in text for word in ("class", "module", "function", "builtin", "object", "frame", "uid=")
    )
    assert messages == [user("Hi")]


# -- bounds


BOMBS = [
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) %}{% for a in r %}{% for b in r if b < 0 %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'a' }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set n = namespace(x=3) %}{% for i in range(99999) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x | replace('a', 'aa') %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set b %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = b %}{% endfor %}",
    "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = m(n.x) %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('b' * 1000000).join(range(99999) | map('string') | list) }}",
    "{{ range(99999) | join('b' * 1000000) }}",
    "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "{{ {'a': 1} | tojson(indent=10 ** 10) }}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_a_template_that_never_ends_or_explodes_is_stopped(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its size, or when it asks for the time often enough; between two questions nothing takes long."""
    start, clock = time.thread_time(), Clock(0.01)
    monkeypatch.setattr("tinychat_mlx.text.sandbox.time", SimpleNamespace(thread_time=clock))
    with pytest.raises(TokenizerError, match="chat template"):
        rendered(source)
    assert clock.reads <= 202
    assert time.thread_time() - start < 60  # each is done in less than 2 s; without an end, none is


def test_the_time_of_a_template_is_bounded_to_two_seconds_of_its_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(0.01)
    monkeypatch.setattr("tinychat_mlx.text.sandbox.time", SimpleNamespace(thread_time=clock))
    with pytest.raises(TokenizerError, match="longer than 2 s"):
        rendered(BOMBS[1])
    assert clock.reads == 201


def test_output_is_bounded_where_the_library_itself_would_not() -> None:
    assert len(rendered("{{ messages[0].content }}", [user("x" * (1 << 20))])) == 1 << 20
    with pytest.raises(TokenizerError, match="more than 4194304 characters"):
        rendered("{% for m in messages %}{{ m.content }}{% endfor %}", [user("x" * (1 << 20))] * 5)
