"""What Hugging Face's chat templates write: tests/fixtures/templates/*.json, for tests/templates.rs.

Needs transformers and jinja2 (made with 5.24.0 and 3.1.6); the tests themselves need no Python.

    python tools/make_template_fixtures.py [OUT_DIR]

expressions.json  every method, filter, test, global and operator that a chat template can use, one small template each, over
                  the same three messages: `{"template": .., "text": ..}`, or `"refused": true` where Jinja raises
families.json     templates in the manner of the most used model families (tools/template_families/*.jinja: our own, shorter
                  ones with the same constructs) over several conversations
dates.json        Python's strftime of naive dates, code by code, in the C locale
"""

import datetime
import json
import pathlib
import sys

import transformers.utils.chat_template_utils as hf

HERE = pathlib.Path(__file__).parent
OUT = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "tests/fixtures/templates"
MESSAGES = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
    {"role": "user", "content": "c <b> & ü \"q\" it's"},
]
NOW = datetime.datetime(2024, 7, 26, 15, 4, 5)


class Fixed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


hf.datetime = Fixed


def render(template, messages, generation=True, **more):
    variables = {"bos_token": "<bos>", "eos_token": "<eos>", **more}
    chats, _ = hf.render_jinja_template([messages], chat_template=template, add_generation_prompt=generation, **variables)
    return chats[0]


def one(template, **more):
    case = {"template": template}
    try:
        case["text"] = render(template, MESSAGES, **more)
        assert " at 0x" not in case["text"], template
    except AssertionError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever Jinja raises is a refusal
        case["refused"] = True
        print(f"refused: {template}: {type(error).__name__}: {error}", file=sys.stderr)
    return case


# Printed one by one as {{ expression }}.
EXPRESSIONS = r"""
'aBc dE'.capitalize()
'Straße'.casefold()
'ab'.center(7)
'ab'.center(7, '*')
'abc'.center(6, '-')
'a'.center(4, '.')
'banana'.count('an')
'banana'.count('')
'banana'.count('a', 2)
'banana'.count('a', 2, 4)
'banana'.endswith('na')
'banana'.endswith(('x', 'na'))
'banana'.endswith('an', 0, 5)
'banana'.startswith('ban')
'banana'.startswith(('x', 'b'))
'banana'.startswith('nan', 2)
'a\tb'.expandtabs()
'a\tbc\td'.expandtabs(4)
'banana'.find('n')
'banana'.find('n', 3)
'banana'.find('n', 3, 4)
'banana'.find('x')
'banana'.rfind('n')
'banana'.rfind('n', 0, 4)
'banana'.index('n')
'banana'.rindex('n')
'banana'.index('x')
'büna'.find('n')
'{} {}'.format(1, 'x')
'{1} {0}'.format(1, 'x')
'{a}-{b}'.format(a=1, b='y')
'{:>5}|{:<5}|{:^5}|'.format('a', 'b', 'c')
'{:05d} {:+d} {:,}'.format(42, 7, 1234567)
'{:.2f} {:e} {:%}'.format(3.14159, 12345.678, 0.25)
'{:x} {:X} {:b} {:o}'.format(255, 255, 5, 8)
'{!r} {!s}'.format('a', 'b')
'{{}} {}'.format(1)
'{0[0]} {0[1]}'.format([1, 2])
'{a}'.format_map({'a': 3})
'ab1'.isalnum()
'ab'.isalpha()
'ab1'.isalpha()
''.isalpha()
'ab'.isascii()
'ü'.isascii()
'12'.isdecimal()
'²'.isdecimal()
'²'.isdigit()
'½'.isdigit()
'½'.isnumeric()
'12'.isdigit()
'1.2'.isdigit()
'_a1'.isidentifier()
'1a'.isidentifier()
'ab c'.islower()
'aB'.islower()
'1'.islower()
'AB C'.isupper()
'A1'.isupper()
' \t\n'.isspace()
''.isspace()
'a b'.isprintable()
'a\nb'.isprintable()
'Ab Cd'.istitle()
'Ab cd'.istitle()
','.join(['a', 'b'])
''.join(['a', 'b', 'c'])
', '.join({'a': 1, 'b': 2})
'-'.join('abc')
','.join([1, 2])
'ab'.ljust(5) ~ '|'
'ab'.ljust(5, '.')
'ab'.rjust(5)
'ab'.rjust(5, '.')
'ABc'.lower()
'abC'.upper()
'xxabxx'.strip('x')
' \n ab\t '.strip()
'xyabyx'.strip('xy')
'xxab'.lstrip('x')
'abxx'.rstrip('x')
' ab '.lstrip() ~ '|'
' ab '.rstrip() ~ '|'
' ab '.strip(none)
'a=b=c'.partition('=')
'abc'.partition('=')
'a=b=c'.rpartition('=')
'abc'.rpartition('=')
'a=b=c'.partition('=')[2]
'xab'.removeprefix('x')
'xab'.removeprefix('y')
'abx'.removesuffix('x')
'abx'.removesuffix('y')
'abx'.removesuffix('')
'banana'.replace('a', 'o')
'banana'.replace('a', 'o', 2)
'banana'.replace('', '-')
'banana'.replace('a', '')
'a,b,c'.split(',')
'a,b,c'.split(',', 1)
'a,b,c'.split(',', -1)
'a,b,c'.split(',', maxsplit=1)
'a,b,c'.split(sep=',')
'a,,b'.split(',')
' a  b c '.split()
' a  b c '.split(none, 1)
' a  b c '.split(maxsplit=1)
''.split()
''.split(',')
'a'.split('')
'a,b,c'.rsplit(',')
'a,b,c'.rsplit(',', 1)
'a,b,c'.rsplit(',', maxsplit=1)[0]
' a  b c '.rsplit()
' a  b c '.rsplit(none, 1)
'a\nb\r\nc\n'.splitlines()
'a\nb\r\nc\n'.splitlines(true)
'a\nb'.splitlines(keepends=true)
''.splitlines()
'a\n\nb'.splitlines()
'aBc'.swapcase()
'they\'re bill\'s'.title()
'hello WORLD-wide'.title()
'7'.zfill(3)
'-7'.zfill(4)
'+7'.zfill(4)
'abcd'.zfill(2)
'abc'.encode()
'a'.translate({97: 'b'})
'ab'.nothing()
'Ab'.lower().upper().title()
'%s-%s' % ('a', 'b')
'%s' % 'a'
'%s' % 5
'%d items, %s' % (3, [1, 'x'])
'%05.1f|%-5s|%5s|%x' % (2.55, 'a', 'b', 255)
'%(a)s %(b)d' % {'a': 'x', 'b': 2}
'100%% %s' % 'a'
'%r %s' % ('a', none)
'a%sb' % messages[0].content ~ '!'
('%s' % 'a') * 2
'%s' % 'a' 'b'
'%s' % messages|length
'%s' % 'a' == 'a'
7 % 4
'%s and %s'|format('x', 2)
'%(k)s'|format(k='v')
[1, 2, 1].count(1)
[1, 2, 1].index(2)
(1, 2, 1).count(1)
(1, 2, 1).index(1)
[3, 1].copy()
[1].append(2)
[1].pop()
[2, 1].sort()
{'a': 1}.get('a')
{'a': 1}.get('b')
{'a': 1}.get('b', 'none')
{'a': 1, 'b': 2}.keys()|list
{'a': 1, 'b': 2}.values()|list
{'a': 1, 'b': 2}.items()|list
{'a': 1}.copy()
{'a': 1}.update({'b': 2})
{'a': 1}.pop('a')
{'a': 1}.setdefault('b', 2)
messages[0].keys()|list
messages[0].items()|list
messages[0]
messages[2]
messages[0].values()|join('/')
messages[0].get('tool_calls')
messages[0].get('name', 'nobody')
(3.0).is_integer()
(3.5).is_integer()
(5).bit_length()
-3|abs
-2.5|abs
messages[0]|attr('role')
[1, 2, 3, 4, 5]|batch(2)|list
[1, 2, 3]|batch(2, 0)|list
'hello WORLD'|capitalize
'ab'|center(6) ~ '|'
nothing|default('d')
''|default('d')
''|default('d', true)
none|default('d')
false|d('x', true)
{'b': 1, 'A': 2}|dictsort
{'b': 1, 'A': 2}|dictsort(true)
{'b': 1, 'A': 2}|dictsort(by='value')
{'b': 1, 'A': 2}|dictsort(false, 'value', true)
'<a href="x">\'&'|escape
'<a>'|e
'<a>'|forceescape
1000000|filesizeformat
1024|filesizeformat(true)
[3, 1]|first
'abc'|first
[]|first
'3.7'|float
'x'|float
'x'|float(1.5)
3|float
'a\nb\n\nc'|indent
'a\nb\n\nc'|indent(2)
'a\nb'|indent(2, true)
'a\nb\n\nc'|indent(2, first=true, blank=true)
'a\nb'|indent('> ')
'a\nb'|indent(width=3)
'42'|int
'0x1A'|int(0, 16)
'x'|int
'x'|int(7)
3.9|int
'3.9'|int
{'a': 1, 'b': 2}|items|list
nothing|items|list
[1, 2, 3]|join
[1, 2, 3]|join('-')
messages|join(', ', attribute='role')
'abc'|join('.')
[3, 1]|last
'abc'|last
'abc'|length
messages|length
{'a': 1}|length
[1, 2]|count
(1, 2)|list
'abc'|list
{'a': 1}|list
'AbC'|lower
5|lower
messages|map(attribute='role')|list
messages|map(attribute='name', default='x')|list
messages|map('length')|list
['a', 'b']|map('upper')|list
['a', 'b']|map('replace', 'a', 'x')|list
[[1, 2], [3]]|map(attribute=0)|list
[3, 1, 2]|max
[3, 1, 2]|min
['b', 'A']|min
['b', 'A']|max(true)
messages|max(attribute='role')
[]|max
{'a': [1, 'x']}|pprint
[1, 2, 3, 4]|reject('odd')|list
[1, 2, 3, 4]|select('even')|list
[0, 1, '', 'a', none]|select|list
[0, 1, '', 'a', none]|reject|list
[1, 2, 3]|select('>', 1)|list
[1, 2, 3]|select('greaterthan', 1)|list
['a', 'b']|select('in', ['a'])|list
['a', 'b']|reject('equalto', 'a')|list
messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list
messages|selectattr('role', '==', 'user')|list|length
messages|selectattr('name')|list
messages|selectattr('name', 'defined')|list
messages|selectattr('name', 'undefined')|list|length
messages|selectattr('role', 'in', ['user', 'tool'])|list|length
messages|rejectattr('role', 'eq', 'user')|map(attribute='role')|list
messages|rejectattr('role', 'ne', 'user')|map(attribute='role')|list
'banana'|replace('a', 'o')
'banana'|replace('a', 'o', 1)
5|replace('5', 'x')
'abc'|reverse
[1, 2]|reverse|list
3.14159|round(2)
2.5|round
3.5|round
42.55|round(1, 'floor')
42.51|round(1, 'ceil')
7|round
1234|round(-2)
'<b>'|safe
[1, 2, 3, 4, 5]|slice(2)|list
[1, 2, 3]|slice(2, 'x')|list
[3, 1, 2]|sort
['b', 'A', 'c']|sort
['b', 'A', 'c']|sort(case_sensitive=true)
[3, 1, 2]|sort(reverse=true)
[3, 1, 2]|sort(true)
messages|sort(attribute='role')|map(attribute='role')|list
5|string ~ 'x'
none|string
[1]|string
'<p>a  <b>b</b></p>'|striptags
[1, 2, 3]|sum
[1.5, 2]|sum
[1, 2]|sum(start=10)
[{'n': 1}, {'n': 2}]|sum(attribute='n')
'hello big-world they\'re'|title
messages[0]|tojson
messages[2]|tojson
messages|tojson
messages[0]|tojson(indent=2)
messages|tojson(indent=4)
messages[0]|tojson(separators=(',', ':'))
messages|tojson(separators=(',', ':'))
messages[0]|tojson(indent=2, separators=(',', ': '))
'ü☃😀'|tojson
'ü☃😀'|tojson(ensure_ascii=true)
'ü'|tojson(ensure_ascii=False)
'ü'|tojson(true)
{'b': 1, 'a': {'d': 1, 'c': 2}}|tojson
{'b': 1, 'a': {'d': 1, 'c': 2}}|tojson(sort_keys=true)
{'b': 1, 'a': 2}|tojson(sort_keys=false)
[1, 1.0, 1.5, -0.0, 1e20, 1e-7, true, false, none, 'a']|tojson
'\u2028 \x7f \x00 \b\f\n\r\t / \\ "'|tojson
"<script>'&'</script>"|tojson
[]|tojson
{}|tojson
[]|tojson(indent=2)
[{}]|tojson(indent=2)
(1, (2, 3))|tojson
{1: 2, none: 3, true: 4, 1.5: 5}|tojson
[1, [2, {'a': []}]]|tojson(indent=0)
[1, 2]|tojson(indent='\t')
nothing|tojson
messages[0]|tojson(nonsense=1)
5|tojson
'a'|tojson|tojson
'  ab '|trim
'xxabx'|trim('x')
'a sentence that is somewhat long'|truncate(15)
'a sentence that is somewhat long'|truncate(15, true)
'a sentence that is somewhat long'|truncate(15, false, '..')
'short'|truncate(15)
'abcdefghij'|truncate(8, true, '', 0)
[1, 2, 1, 'a', 'A']|unique|list
['a', 'A']|unique(true)|list
'ab'|upper
'a b&c/ü'|urlencode
{'a': 'x y', 'b': 1}|urlencode
'one two  three'|wordcount
'aaa bbb ccc ddd'|wordwrap(7)
'see http://a.b/c and x'|urlize
{'class': 'x', 'id': none}|xmlattr
true is boolean
1 is boolean
messages is callable
range is callable
raise_exception is callable
nothing is defined
messages is defined
6 is divisibleby 3
6 is divisibleby(4)
2 is eq 2
2 is equalto 3
2 is == 2
'a' is escaped
4 is even
false is false
true is true
1 is true
'upper' is filter
'nothing' is filter
1.0 is float
1 is float
3 is ge 2
3 is gt 3
3 is greaterthan 2
1 is in [1, 2]
'a' is in 'abc'
1 is integer
true is integer
1.0 is integer
'abc' is iterable
5 is iterable
messages is iterable
messages[0] is iterable
nothing is iterable
none is iterable
2 is le 2
2 is lt 2
2 is lessthan 3
'abc' is lower
'Abc' is lower
messages[0] is mapping
messages is mapping
dict(a=1) is mapping
2 is ne 2
none is none
'' is none
nothing is none
1 is number
'1' is number
true is number
1.5 is number
3 is odd
none is sameas none
true is sameas true
messages is sameas messages
'abc' is sequence
messages is sequence
messages[0] is sequence
(1, 2) is sequence
5 is sequence
none is sequence
range(3) is sequence
messages[0].items() is sequence
nothing is sequence
'abc' is string
5 is string
messages[0].content is string
'even' is test
'nothing' is test
nothing is undefined
messages is undefined
'ABC' is upper
'ABc' is upper
messages[0] is not mapping
messages[0].content is not string
not messages
not []
1 + 2 * 3
7 / 2
6 / 2
7 // 2
-7 // 2
7.5 // 2
7 % 3
-7 % 3
2 ** 10
2 ** -1
2 ** 3 ** 2
-2 ** 2
1.0 + 2
0.1 + 0.2
1e3
1e16
1e15
123456789.125
1e-5
0.0001
1 / 3
10 ** 20
3.0
-0.0
100 * 1.1
'a' ~ 1 ~ none ~ true ~ 1.5
'a' + 'b'
'a' + 1
'ab' * 3
3 * 'ab'
[1] + [2]
[1] * 2
(1,) + (2,)
1 < 2 < 3
1 < 3 > 2
1 == 1.0
'a' == 'a'
'1' == 1
none == false
[1, 2] == [1, 2]
{'a': 1} == {'a': 1}
(1, 2) == [1, 2]
'a' < 'b'
[1, 2] < [1, 3]
1 in [1, 2]
'b' in 'abc'
'role' in messages[0]
'x' not in messages[0]
'a' in ('a', 'b')
true and false
1 and 'a'
0 or 'b'
'' or none
none and 1
not true or true
'y' if true else 'n'
'y' if false else 'n'
'y' if false
true
false
none
True
None
[]
{}
()
[1, 'a', none, true, 1.5]
('a',)
(1, 2)
{'a': 'b', 'c': [1]}
{1: 2}
'it\'s'
["it's", 'say "x"', 'both \' and "']
['a\nb\t\\', 'ü', '\x00\x7f\u200b']
[1e20, 1e-7, 1.0]
[[], {}, ()]
'abc'[0]
'abc'[-1]
'abc'[5]
'abc'[1:]
'abc'[:-1]
'abcdef'[::2]
'abcdef'[::-1]
'abcdef'[4:1:-1]
'aüb'[1]
[1, 2, 3][1:]
[1, 2, 3][::-1]
[1, 2, 3][-2:]
(1, 2, 3)[:2]
messages[-1].role
messages[1:]|length
messages[0]['role']
messages[0].role
messages.0.role
messages[0].nothing
messages[7]
messages[7].role
nothing.x
messages[0]['content'][0]
range(3)|list
range(1, 4)|list
range(5, 0, -2)|list
range(3)
range(3)[1]
dict(a=1, b='x')
dict([('a', 1), ('b', 2)])
dict({'a': 1}, b=2)
dict.fromkeys(['a', 'b'])
namespace(a=1).a
namespace(a=1).b
namespace({'a': 3}).a
joiner(', ')()
lipsum is defined
cycler('a', 'b').next()
"a" 'b' "c"
'\u00fc\x41\101\n|\t|\\|\'|\"'
'\N{SNOWMAN}'
'a\
b'
1_000
0x1f + 0b11 + 0o17
12345678901234567890
add_generation_prompt
bos_token ~ eos_token
tools
tools is none
documents is none
tools is defined
strftime_now('%d %B %Y')
strftime_now('%Y-%m-%d %H:%M:%S')
raise_exception('no')
messages | map(attribute='content') | map('length') | sum
messages|groupby('role')|map('first')|list
messages|groupby(attribute='role')|length
(messages|groupby('role'))[0].grouper
(messages|groupby('role'))[0].list|length
messages|map(attribute='role')|unique|list|sort
messages|selectattr('role', 'equalto', 'user')|first
(messages|last).role
messages|first|tojson
""".strip("\n")

# Whole templates: statements, blanks, scopes.
TEMPLATES = r"""
{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }} {% endfor %}
{% for m in messages %}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{{ loop.depth }}{{ loop.depth0 }}{% endfor %}
{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '-' }}{{ loop.nextitem.role if loop.nextitem is defined else '-' }}{% endfor %}
{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.length }}{% else %}none{% endfor %}
{% for m in [] %}x{% else %}none{% endfor %}
{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}
{% for k in messages[0] %}{{ k }};{% endfor %}
{% for (a, b), c in [((1, 2), 3)] %}{{ a }}{{ b }}{{ c }}{% endfor %}
{% for a, b in [[1, 2], [3, 4]] %}{{ a }}{{ b }}{% endfor %}
{% for c in 'abc' %}{{ c }}.{% endfor %}
{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}
{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}
{% for i in range(2) %}{% for j in range(2) %}{{ loop.index }}{{ i }}{{ j }} {% endfor %}{% endfor %}
{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}
{% for m in nothing %}x{% else %}none{% endfor %}
{% set x = 1 %}{% for i in range(3) %}{% set x = x + 1 %}{% endfor %}{{ x }}
{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.s = ns.s ~ m.role[0] %}{% endfor %}{{ ns.n }}{{ ns.s }}
{% set ns = namespace() %}{% if ns.x is defined %}d{% else %}u{% endif %}{% set ns.x = none %}{{ ns.x is none }}
{% if true %}{% set x = 1 %}{% endif %}{{ x }}
{% set a, b = 1, 2 %}{{ a }}{{ b }}
{% set x = 1, 2 %}{{ x }}
{% set x %}a {{ 1 + 1 }}{% endset %}{{ x }}|{{ x|length }}
{% set x | upper | trim %} abc {% endset %}[{{ x }}]
{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a }}
{% with %}{% set q = 1 %}{{ q }}{% endwith %}{{ q }}
{% macro f(a, b='x') %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, 2) }}{{ f(1, b=3) }}{{ f(b=1, a=2) }}
{% macro f() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, x=2) }}
{% macro f(x) %}<{{ x }}{{ caller() if caller }}>{% endmacro %}{% call f(1) %}body{% endcall %}{{ f(2) }}
{% macro f() %}{{ caller(1, 2) }}{% endmacro %}{% call(a, b) f() %}{{ a }}{{ b }}{% endcall %}
{% macro g(x) %}{% if x > 0 %}{{ x }}{{ g(x - 1) }}{% endif %}{% endmacro %}{{ g(3) }}
{%- macro f(m) -%} {{ m.role }} {%- endmacro -%}[{{ f(messages[0]) }}]
{% macro f(a) %}{{ a is defined }}{% endmacro %}{{ f() }}
{% macro f(a) %}{{ f.name }}{{ f.arguments }}{% endmacro %}{{ f(1) }}
{% macro f(items) %}{{ items|length }}{% endmacro %}{{ f(messages) ~ '!' }}{{ f([])|int + 1 }}
{% filter upper %}abc{{ 1 }}x{% endfilter %}
{% filter replace('a', 'b')|upper %}abc{% endfilter %}
{% raw %}{{ x }}{% generation %}{% endraw %}
{# a comment {% if %} #}a
{#- a -#} b
a {#- c -#} b
{% if messages[0].role == 'user' and not messages[0].tool_calls %}y{% elif true %}z{% else %}n{% endif %}
{% if messages[0].name is defined and messages[0].name %}y{% else %}n{% endif %}
{% if nothing %}y{% else %}n{% endif %}
{% if [] or {} or '' or 0 or 0.0 or none or () %}y{% else %}n{% endif %}
{% if 'a' is string and messages is not string and messages is sequence %}y{% endif %}
{% if not messages[5] is defined %}n{% endif %}
{% generation %}a{% endgeneration %}b
{%- generation -%} a {%- endgeneration -%} b
{% for m in messages %}{% generation %}{{ m.role }}{{ loop.index }}{% set z = 1 %}{% endgeneration %}{{ z }}{% endfor %}
{% for m in messages %}{%- if m.role == 'assistant' -%}{%- generation -%}{{ m.content }}{{ eos_token }}{%- endgeneration -%}{%- endif -%}{% endfor %}
{% generation %}{% if true %}x{% endif %}{% endgeneration %}{{ '{% generation %}' }}{# {% generation %} #}
{% set x = 5 %}{% generation %}{{ x }}{% set x = 6 %}{{ x }}{% endgeneration %}{{ x }}
{%+ generation %} a{%+ endgeneration %}
{% generation %}unclosed
{% endgeneration %}
{{ 'a' -}} b {{- 'c' }}
{{- 'a' }} b
  {%- if true %} a {% endif -%}  b
  {%+ if true %} a {%+ endif %} b
{% if true +%}a{% endif %}
{{ messages[0].content.split('</think>')[-1].lstrip('\n') if '</think>' in messages[0].content else messages[0].content }}
{{ messages[1].content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') }}
{% set c = messages[1].content %}{% if '</think>' in c %}{% set c = c.split('</think>', 1)[1] %}{% endif %}[{{ c.strip() }}]
{% set d = dict(a=1) %}{% for k in d %}{{ k }}{% endfor %}{{ d.a }}{{ d['a'] }}
{% set l = [] %}{% set l = l + [1] %}{{ l }}
{% set l = [1, 2] %}{% set _ = l.append(3) %}{{ l }}
{% do 1 %}
{% set t = {'a': [1, {'b': none}]} %}{{ t | tojson(indent=2) }}|{{ t.a[1].b is none }}
{{ {'a': 1}.items() | list | tojson }}
{%- for key, value in messages[0]|dictsort %}{{ key }}:{{ value }},{% endfor %}
{%- for key, value in messages[0]|items %}{{ key }}:{{ value }},{% endfor %}
{{ {'items': 1}['items'] }}|{{ {'keys': 2}['keys'] }}
{{ {'get': 5}['get'] }}
{% set m = messages[0] %}{{ m.role if m.role in ['user', 'system'] else raise_exception('bad role ' ~ m.role) }}
{{ raise_exception('bad role ' ~ messages[0].role) }}
{% if (messages[0]['role'] == 'user') != (0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}ok
{{ messages[0].content | trim | upper ~ '!' }}
{{ (messages[0].content ~ 'x') | length }}
{{ -1 | abs }}{{ (-1) | abs }}
{{ 2 + '3' | int }}
{{ messages | length - 1 }}
{{ loop is defined }}{{ self is defined }}
{% set first = messages | first %}{{ first.role }}
{% autoescape true %}{{ '<' }}{% endautoescape %}
{% import 'x' as y %}
{% include 'x' %}
{% extends 'x' %}
{% block a %}x{{ 1 }}{% endblock %}
{{ self.a() }}{% block a %}x{% endblock %}
{% nothing %}
{{ nothing() }}
{{ 'a' | nothing }}
{{ 'a' is nothing }}
{{ nothing + 1 }}
{{ nothing ~ 'a' }}{{ nothing == none }}{{ nothing|length }}
{{ '__class__' }}{{ ''.__class__ }}
{{ messages.__len__ }}
{{ 1 if 2 if 3 }}
{{ }}
{{ 'a' }
{% if %}{% endif %}
{% endif %}
{{ {'a': 1, **{'b': 2}} }}
{{ [x for x in messages] }}
{{ lambda x: x }}
{{ f'{x}' }}
{{ a := 1 }}
{{ messages[0].role | default('x') | upper }}{{ nothing.y | default('x') }}
{{ messages[0].nothing.x }}
{% set ns = namespace(found=false) %}{% for m in messages %}{% if m.role == 'assistant' and not ns.found %}{% set ns.found = true %}{{ loop.index0 }}{% endif %}{% endfor %}{{ ns.found }}
{% set j = joiner(', ') %}{% for m in messages %}{{ j() }}{{ m.role }}{% endfor %}
{% set c = cycler('a', 'b') %}{% for m in messages %}{{ c.next() }}{{ c.current }}{% endfor %}{% set _ = c.reset() %}{{ c.current }}
{{ caller is defined }}{{ varargs is defined }}
{% set a = [1, 2, 3] %}{% set b = a[1:] %}{{ b }}{{ a }}
{{ "line one\nline two" | indent(4) }}
{{ 1 }}{{ 1.0 }}{{ true }}{{ none }}{{ [true, none] }}
{% set x = messages|tojson %}{{ x|length }}{{ x[:9] }}
{{ messages[0]|string }}
{{ ('a', 'b')|join }}{{ ('a', 'b') }}
{{ 'a' if messages is defined else 'b' }}{{ ('x' if false else 'y') ~ 'z' }}
{{ not 'x' in 'abc' }}{{ 'x' not in 'abc' }}{{ not (1 == 1) }}
{{ [1, 2, 3] | select('odd') | map('string') | join('-') }}
{{ messages | map(attribute='role') | join(' > ') }}
{{ messages | rejectattr('role', 'in', ['assistant', 'tool']) | list | length }}
{{ '' | default('empty', boolean=true) }}{{ none | default('none', boolean=True) }}
{{ messages[0].content is string and messages[0].content|length > 0 }}
{{ messages[0].content | list }}{{ messages[0].content * 2 }}
{%- set loop_messages = messages[1:] if messages[0].role == 'system' else messages -%}{{ loop_messages|length }}
{%- set tool_calls = messages[0].tool_calls or [] %}{{ tool_calls|length }}
{{- bos_token -}}  {%- for m in messages -%}  [{{- m.role -}}]  {%- endfor -%}
""".strip("\n")

# Blanks and line breaks are what these are about: not one to a line.
BLOCKS = [
    "  {% if true %}\na\n  {% endif %}\nb\n",
    "{% if true %}\n\na\n{% endif %}\n\n",
    "{% for m in messages %}\n{{ m.role }}\n{% endfor %}\n",
    "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n        {{- m.content }}\n    {%- else %}\n        {{- 'A' }}\n    {%- endif %}\n{%- endfor %}\nend",
    "{%- for m in messages %}\n    {% if m.role == 'user' %}\nU {{ m.content }}\n    {% else %}\n  A\n    {% endif %}\n{% endfor %}\nend\n",
    "a\n  {# comment #}\nb\n",
    "a\n  {#- comment -#}\nb\n",
    "a\n\n\n",
    "a\r\nb\r\n",
    "{{ 'a' }}\n{{ 'b' }}\n",
    "\n\n{% if true %}x{% endif %}\n\ny",
    "\t{% if true %}x{% endif %}",
    "x  {% if true %}  y  {% endif %}  z",
    "{% generation %}\n  a\n{% endgeneration %}\n  b",
    "  {% generation %}\na\n  {% endgeneration %}\nb\n",
    "  {%- generation -%}\n a \n{%- endgeneration -%}\n b ",
    "{% raw %}\n{{ x }}\n{% endraw %}\ny",
    "{% set x %}\n a\n{% endset %}\n[{{ x }}]",
    "{% macro f() %}\n a\n{% endmacro %}\n[{{ f() }}]",
    "{{ '\n' }}|{{ \"a\n b\" }}",
    "{{ 'x'\n   ~ 'y'\n}}",
    "{{- messages[0].content\n    | upper\n    | trim -}}\n  z",
    "{%- if messages[0].role == 'user' and\n      messages[0].content -%}\ny\n{%- endif %}",
    "{# {{ 'unclosed #}a",
    "{{ '}}' }}{{ '%}' }}{{ '{{' }}{{ '{#' }}",
    "a {{ '{%' }} b",
    "{% set a = '{% generation %}' %}{{ a }}",
]

DATE_CODES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ%fq"
DATES = [
    datetime.datetime(2024, 7, 26, 15, 4, 5),
    datetime.datetime(2000, 2, 29, 0, 0, 0),
    datetime.datetime(1999, 12, 31, 23, 59, 59),
    datetime.datetime(2021, 1, 3, 12, 30, 1),
    datetime.datetime(2025, 12, 29, 1, 2, 3),
    datetime.datetime(1970, 1, 1, 0, 0, 0),
]
FORMATS = (
    ["%" + code for code in DATE_CODES]
    + ["%" + flag + code for flag in "-_0^#" for code in "dmYHIjyeklbBapPCU"]
    + ["%5d", "%3Y", "%010Y", "%-5d", "%_5d", "%10B", "%^10b", "%Ey", "%EY", "%Od", "%Om", "%OH", "%Ec", "%12F", "%3%"]
    + ["%d %b %Y", "%B %d, %Y", "%A", "a%", "%", "", "ü %Y", "%%Y", "%-d.%-m.%y", "% d"]
)


def dates():
    rows = []
    for date in DATES:
        seconds = int(date.replace(tzinfo=datetime.timezone.utc).timestamp())
        rows.append({"unix_s": seconds, "texts": {text: date.strftime(text) for text in FORMATS}})
    return rows


CONVERSATIONS = {
    "one": [("user", "What is 2+2?")],
    "system": [("system", "Be brief.\n"), ("user", " Hi there ")],
    "history": [("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c <b> & ü")],
    "long": [("system", "S"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"), ("user", "q3")],
    "ended": [("user", "q"), ("assistant", "<think>\nthoughts\n</think>\n\nanswer")],
}


def families():
    rows = []
    for path in sorted((HERE / "template_families").glob("*.jinja")):
        source = path.read_text()
        cases = []
        for name, turns in CONVERSATIONS.items():
            messages = [{"role": role, "content": content} for role, content in turns]
            for more in [{}, {"enable_thinking": True}, {"enable_thinking": False}]:
                if more and "enable_thinking" not in source:
                    continue
                case = {"turns": turns, "generation": name != "ended", **more}
                try:
                    case["text"] = render(source, messages, case["generation"], **more)
                except Exception as error:  # noqa: BLE001
                    case["refused"] = True
                    print(f"refused: {path.name} {name}: {error}", file=sys.stderr)
                cases.append(case)
        rows.append({"family": path.stem, "template": source, "cases": cases})
    return rows


def write(name, rows):
    text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    (OUT / name).write_text(text)
    print(f"{OUT / name}: {len(rows)} rows", file=sys.stderr)


expressions = [one("{{ " + text + " }}") for text in EXPRESSIONS.split("\n")]
expressions += [one(text) for text in TEMPLATES.split("\n")] + [one(text) for text in BLOCKS]
write("expressions.json", expressions)
write("families.json", families())
write("dates.json", dates())
