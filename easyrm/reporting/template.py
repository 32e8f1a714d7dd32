"""The page, as a Jinja template that escapes whatever is put into it. It loads nothing from anywhere."""

STYLE = """
:root { --ink: #1f2733; --soft: #5b6675; --line: #e3e7ed; --paper: #fff; --back: #f5f7f9; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 36px 20px 64px; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .25rem; overflow-wrap: anywhere; }
p { max-width: 76ch; margin: .45rem 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 205px), 1fr)); gap: 12px;
  margin: 1.2rem 0; }
.card, .panel { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 13px 16px; overflow-wrap: anywhere; }
.card b { display: block; font-size: 1.55rem; line-height: 1.3; font-weight: 650; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 14px;
  margin: .9rem 0; }
.panel { padding: 14px; min-width: 0; }
.panel img { display: block; width: 100%; height: auto; max-width: 640px; margin: 0 auto; }
.panel p { font-size: .92rem; margin: .6rem 4px 0; }
.absent { color: var(--soft); margin: 0 4px; }
.wide { overflow-x: auto; padding: 4px 14px; margin: .9rem 0; }
.wide table { min-width: 660px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.number { text-align: right; white-space: nowrap; padding-right: 26px; }
details { margin: .9rem 0; }
details.panel { padding: 0 14px; }
summary { cursor: pointer; padding: 11px 0; font-weight: 600; }
code { font: .86em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 560px) { main { padding: 22px 12px 40px; } .panel { padding: 9px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 8px; } .card { padding: 10px 12px; } .card b { font-size: 1.25rem; } }
@media print { body { background: #fff; } .panel, .card { break-inside: avoid; } }
"""

PAGE = """
{%- macro cards(items) -%}
<div class="cards">
{% for card in items %}<div class="card"><span class="soft">{{ card.title }}</span><b>{{ card.value }}</b>
<span class="soft">{{ card.about }}</span></div>
{% endfor %}</div>
{%- endmacro -%}
{%- macro figures(panels) -%}
<div class="figures">
{% for panel in panels %}<div class="panel">
{% if panel.image %}<img src="data:image/png;base64,{{ panel.image }}" alt="{{ panel.alt }}">{% endif %}
{% for text in panel.texts %}<p{% if not panel.image %} class="absent"{% endif %}>{{ text }}</p>
{% endfor %}</div>
{% endfor %}</div>
{%- endmacro -%}
{%- macro table(rows) -%}
<table><tr>{% for name in rows.head %}<th{% if loop.index0 in rows.numbers %} class="number"{% endif %}>{{ name }}</th>
{%- endfor %}</tr>
{% for row in rows.body %}<tr>{% for cell in row %}<td{% if loop.index0 in rows.numbers %} class="number"{% endif %}>
{{- cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }} · easyrm report</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="soft">{{ about }}</p>
{{ cards(headline) }}
<h2>Data: read and dropped</h2>
<div class="panel wide">{{ table(data) }}</div>
{% for note in notes %}<p class="soft">{{ note }}</p>
{% endfor %}
<h2>Training</h2>
{{ figures(training) }}
{% for part in evaluations %}<section>
<h2>{{ part.title }}</h2>
<p class="soft">{{ part.about }}</p>
{{ cards(part.cards) }}
{{ figures(part.panels) }}
{% if part.subsets.body %}<details class="panel"><summary>Subsets as a table</summary>
{{ table(part.subsets) }}</details>{% endif %}
</section>
{% else %}<h2>Evaluation</h2>
<p>This run has no evaluations/STEP/NAME.json, so there are no reward distributions, no calibration, no length bias and
no accuracy by subset to show; python -m easyrm.evaluate scores a model on held-out pairs or a benchmark.</p>
{% endfor %}
<h2>Speed</h2>
{{ figures(speed) }}
<h2>Configuration</h2>
{% for part in tables %}<details class="panel"><summary>{{ part.title }}</summary>
{{ table(part.rows) }}</details>
{% endfor %}
</main>
</body>
</html>
"""
