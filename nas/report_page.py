"""The report's page: its markup, look and the few lines that draw its charts, with `$name` where content goes."""

_STYLE = """
:root { color-scheme: light dark; --page:#f5f6f8; --card:#ffffff; --text:#1b2430; --soft:#5b6675; --line:#e1e5ea;
  --front:#1767d1; --chosen:#e0562b; --muted:#8b97a6; --faint:#c3cad3; --wash:#eef4fd; }
@media (prefers-color-scheme: dark) { :root { --page:#11151b; --card:#191f27; --text:#e4e9f0; --soft:#97a3b3; --line:#2b343f;
  --front:#62a5ff; --chosen:#ff8a5c; --muted:#7d8a9b; --faint:#48535f; --wash:#1c2a3d; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--page); color:var(--text); font:15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width:1120px; margin:0 auto; padding:28px 20px 60px; }
h1 { font-size:1.75rem; line-height:1.2; margin:0 0 4px; overflow-wrap:anywhere; }
h2 { font-size:1.12rem; margin:0 0 10px; } h3 { font-size:.95rem; margin:12px 0 2px; }
p { margin:0 0 8px; max-width:80ch; }
section { background:var(--card); border:1px solid var(--line); border-radius:12px; padding:18px 20px; margin-top:18px; min-width:0; }
.brand { color:var(--soft); font-size:.85rem; margin:0 0 10px; letter-spacing:.02em; }
.head { display:flex; flex-wrap:wrap; gap:10px 34px; margin:14px 0 0; }
dt { color:var(--soft); font-size:.8rem; } dd { margin:0; font-weight:600; overflow-wrap:anywhere; }
.choice { font-weight:650; font-size:1.05rem; margin-bottom:2px; } .star { color:var(--chosen); }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(150px, 1fr)); gap:10px; margin-top:12px; }
.tiles div { background:var(--wash); border-radius:9px; padding:9px 12px; }
.tiles b { display:block; font-size:1.08rem; font-variant-numeric:tabular-nums; } .tiles span { color:var(--soft); font-size:.82rem; }
.findings { margin:0; padding-left:1.15em; max-width:88ch; } .findings li { margin:4px 0; }
.buttons { display:flex; flex-wrap:wrap; gap:6px; margin:0 0 6px; }
button { font:inherit; font-size:.86rem; color:var(--text); background:transparent; border:1px solid var(--line); border-radius:999px;
  padding:4px 13px; cursor:pointer; }
button[aria-pressed="true"] { background:var(--front); border-color:var(--front); color:var(--card); font-weight:600; }
button:focus-visible { outline:2px solid var(--chosen); outline-offset:2px; }
.note { color:var(--soft); }
.scroll { overflow-x:auto; margin:0 -20px; padding:0 20px; }
table { border-collapse:collapse; width:100%; font-size:.89rem; font-variant-numeric:tabular-nums; }
th { text-align:left; color:var(--soft); font-weight:600; border-bottom:1px solid var(--line); white-space:nowrap; }
th, td { padding:7px 18px 7px 0; vertical-align:top; } td { border-bottom:1px solid var(--line); white-space:nowrap; }
td.wide { white-space:normal; min-width:17em; overflow-wrap:anywhere; }
tr:last-child td { border-bottom:0; } tr.best td { font-weight:600; }
.stage { display:grid; grid-template-columns:7em 1fr 5.5em; gap:12px; align-items:center; margin:5px 0; }
.stage span { overflow:hidden; text-overflow:ellipsis; }
.stage i { background:var(--front); height:12px; border-radius:6px; min-width:2px; }
.stage b { font-weight:500; text-align:right; font-variant-numeric:tabular-nums; }
.settings { margin:0; } .settings > div { display:grid; grid-template-columns:11em 1fr; gap:12px; padding:4px 0; }
.settings dd { font-weight:400; } summary { cursor:pointer; color:var(--front); }
pre { margin:6px 0 0; padding:10px; background:var(--page); border-radius:8px; overflow:auto; max-height:24em; font-size:.8rem; }
@media (max-width:600px) { main { padding:18px 10px 40px; } section { padding:14px 13px; border-radius:10px; }
  .scroll { margin:0 -13px; padding:0 13px; } .settings > div { grid-template-columns:1fr; gap:0; } h1 { font-size:1.4rem; }
  .tiles { grid-template-columns:repeat(2, 1fr); } }
@media print { body { background:#fff; } section { break-inside:avoid; } .buttons { display:none; } }
"""

_DRAW = """
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  if (typeof Plotly === "undefined") return;
  const paint = (value, key, css) => {
    if (Array.isArray(value)) return value.map(v => paint(v, "", css));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v, k, css)]));
    return key === "color" && typeof value === "string" && value.startsWith("--") ? css.getPropertyValue(value).trim() : value;
  };
  const draw = (id, figure) => {
    const place = document.getElementById(id);
    if (!figure || !place) return;
    const css = getComputedStyle(document.documentElement), color = name => css.getPropertyValue(name).trim();
    const {data, layout} = paint(figure, "", css);
    const axis = given => ({gridcolor: color("--line"), linecolor: color("--line"), zeroline: false, fixedrange: true, ...given});
    layout.xaxis = axis(layout.xaxis); layout.yaxis = axis(layout.yaxis);
    Object.assign(layout, {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
      font: {color: color("--text"), size: 12.5, family: "system-ui, sans-serif"},
      hoverlabel: {bgcolor: color("--card"), bordercolor: color("--line"), font: {color: color("--text"), size: 12.5}, align: "left"}});
    const hidden = {color: "rgba(0,0,0,0)"}, small = {color: color("--text"), size: 11};
    if (id === "design") for (const t of data) Object.assign(t, {rangefont: hidden, tickfont: small});
    Plotly.react(place, data, layout, {responsive: true, displayModeBar: false});
  };
  let axis = figures.first;
  const fronts = () => [figures.front, ...(figures.others || [])].forEach((drawn, i) => draw("front" + (i || ""), drawn[axis]));
  const all = () => { fronts(); draw("design", figures.design); draw("importance", figures.importance); };
  const buttons = [...document.querySelectorAll("button[data-axis]")];
  for (const button of buttons) button.addEventListener("click", () => {
    axis = button.dataset.axis;
    for (const b of buttons) b.setAttribute("aria-pressed", String(b === button));
    fronts();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  all();
})();
"""

_READING = """
<p><b>Bits per byte</b> is how many bits the model needs, on average, to predict the next byte of text it has not seen; lower is better.
It compares models with different vocabularies, which loss per token does not. With <code>--accuracy FILE</code> a search minimises the
loss on that file instead, and shares of right answers stand beside it in brackets.</p>
<p>There are <b>two errors</b>, and they are of different things. ± is one standard error over the held-out documents or tasks: other text
would move all candidates together, as they share it. The error bars of the picture, where the run has repeats, are the standard deviation
between trainings of one model with other seeds: that moves each candidate by itself. Two models closer than 2√2 of it cannot be told
apart by one training each; on the front they are hollow, and “within noise” in the table.</p>
<p>A trial that was <b>stopped early</b> was not foretold to end clearly better than a finished one that is at least as fast: a grey cross
at the score of the text that it had read, which does not compare with scores of the whole budget; it is never on the front. Such forecasts
err at times: a front may lack a model that it would have with <code>--rungs none</code>. A <b>twin</b> is a smaller model of the same kind,
trained and scored in place of one too large to train here; times and sizes are always of the model itself.</p>
<p><b>Characters per second</b> is text generated, counting one byte as one character. It is the fair measure of speed: a larger vocabulary
takes longer for a token but needs fewer of them. A <b>request</b> is the whole job, reading the prompt and writing the answer.</p>
<p><b>The front</b> holds the models that no other candidate beats in both speed and accuracy. Large marks are that front on every axis;
the step line is the best accuracy reachable at each value of the axis shown. The <b>default choice</b> (★) is the knee: the point furthest
below the line joining the front's ends, on a log time scale. Past it, a little accuracy costs a lot of time.</p>
<p>In a search over <b>several devices</b> every model is trained once and measured on each. There is a front on each device, and the
joint front of models that no other beats everywhere at once; its default choice goes by the geometric mean of the times. <b>References</b>
are models measured on the same device beside the candidates; one whose weights were not there has no score and is a dotted line.</p>
<p><b>Weights</b> are trained as 32-bit floats. Where a precision is named, a model was compiled, measured and scored with its matrices
rounded to it: its bits per byte are those of what the device computes with.</p>
<p><b>What a model spends its time on</b> is measured beside its times, kernel by kernel: one prefill of the prompt, one decoding step.
GFLOP/s count its matrix products, GB/s the weights and cached rows it must read; the last row is the most this device was seen to do.</p>
<p>Scores come from short training, so they rank candidates; they are not what a model reaches when trained in full. <b>Importance</b> says
how much the values of a parameter among the better half of candidates differ from everyone's (PED-ANOVA); with few trials it is rough.</p>
"""

PAGE_BEGIN = (
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data: blob:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'">
<title>$title – Edgewise</title><style>"""
    + _STYLE
    + """</style></head><body><main>
<header><p class="brand">Edgewise report</p><h1>$title</h1><dl class="head">$headline</dl></header>
"""
)
"""A page up to its first section."""

PAGE_END = (
    """
</main>
<script type="application/json" id="figures">$figures</script>
<script>$plotly</script>
<script>"""
    + _DRAW
    + """</script></body></html>
"""
)
"""A page from its last section on; the chart of `figures["front"][figures["first"]]` is drawn in the element "front"."""

PAGE = (
    PAGE_BEGIN
    + """<section id="choice">$chosen</section>
<section><h2>Speed against accuracy</h2>$front_note<div class="buttons" role="group" aria-label="Horizontal axis">$buttons</div>
$charts</section>
<section><h2>What this run shows</h2><ul class="findings">$findings</ul></section>
<section><h2>The front</h2>$table</section>
<section><h2>What a model spends its time on</h2>$breakdowns</section>
<section><h2>Designs</h2>$design_note<div class="scroll"><div id="design"></div></div></section>
<section><h2>What matters</h2>$importance_note<div id="importance"></div></section>
<section><h2>Trials that did not complete</h2>$unfinished</section>
<section><h2>Where the time went</h2>$stages</section>
<section><h2>How to read this</h2>"""
    + _READING
    + """</section>
<section><h2>Settings</h2>$settings</section>"""
    + PAGE_END
)
"""A `string.Template`."""
