async function library() {
  const packed = Uint8Array.from(atob(document.getElementById('plotly').textContent), c => c.charCodeAt(0));
  const script = document.createElement('script');
  script.textContent = await new Response(
    new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
  document.head.append(script);
}
const scheme = window.matchMedia('(prefers-color-scheme: dark)');
function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = name => style.getPropertyValue(name).trim();
  return { 'font.color': of('--ink'), 'xaxis.gridcolor': of('--grid'), 'yaxis.gridcolor': of('--grid'),
    'xaxis.linecolor': of('--grid'), 'yaxis.linecolor': of('--grid'),
    'hoverlabel.bgcolor': of('--card'), 'hoverlabel.bordercolor': of('--soft'), 'hoverlabel.font.color': of('--ink') };
}
const charts = [...document.querySelectorAll('.chart')];
// Exponential mean without the bias of its beginning, as TensorBoard smooths.
const smoothed = (values, share) => {
  let mean = 0, weight = 0;
  return values.map(value => {
    if (value === null) return null;
    mean = share * mean + (1 - share) * value;
    weight = share * weight + (1 - share);
    return mean / weight;
  });
};
const slider = () => document.getElementById('smoothing');
const smooths = chart => slider() && chart.closest('.lines') && chart.closest('section').contains(slider());
const draw = async chart => {
  const figure = JSON.parse(document.getElementById(chart.id + '-data').textContent);
  if (!figure.layout.width) figure.layout.width = chart.clientWidth;
  const share = smooths(chart) ? +slider().value : 0;
  if (share > 0) {
    const faint = figure.data.map(trace => ({ ...trace, opacity: 0.25, showlegend: false, hoverinfo: 'skip', hovertemplate: null }));
    figure.data = [...faint, ...figure.data.map(trace => ({ ...trace, mode: 'lines', y: smoothed(trace.y, share) }))];
  }
  await Plotly.react(chart, figure.data, figure.layout, figure.config);
  await Plotly.relayout(chart, colours());
};
window.report = library().then(() => Promise.all(charts.map(draw)))
  .then(() => { document.documentElement.dataset.drawn = charts.length; });
window.report.catch(error => charts.forEach(chart => {
  chart.textContent = `Not drawn (${error}): the charts need a browser of 2023 or newer; figures/ has them as SVG.`;
}));
// Charts of fixed cells keep their width and scroll; curves take what there is.
const fit = () => document.querySelectorAll('.lines .chart').forEach(chart =>
  chart.clientWidth && window.Plotly && Plotly.relayout(chart, { width: chart.clientWidth }));
window.addEventListener('resize', () => { clearTimeout(window.fitting); window.fitting = setTimeout(fit, 100); });
scheme.addEventListener('change', () => window.Plotly && charts.forEach(chart => Plotly.relayout(chart, colours())));

if (slider()) slider().addEventListener('input', () => {
  document.getElementById('smoothing-value').textContent = (+slider().value).toFixed(2);
  charts.filter(smooths).forEach(draw);
});

// The table of completions: sorted by a heading, filtered by step, reward and words.
const table = document.querySelector('.completions');
const shown = { key: 'step', down: true, most: 40 };
const element = (name, text, of) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (of) of.append(made);
  return made;
};
const rows = () => JSON.parse(table.querySelector('script').textContent);
const number = value => typeof value === 'number' ? +value.toFixed(4) : value;
function list() {
  const [step, kind, words] = ['step', 'kind', 'words'].map(name => table.querySelector(`[name=${name}]`).value);
  const all = rows();
  const best = Math.max(...all.map(row => row.reward)), worst = Math.min(...all.map(row => row.reward));
  const fits = row => (!step || String(row.step) === step)
    && (kind !== 'best' || row.reward === best) && (kind !== 'worst' || row.reward === worst)
    && (kind !== 'cut' || row['cut off'])
    && (!words || JSON.stringify(row).toLowerCase().includes(words.toLowerCase()));
  const sign = shown.down ? -1 : 1;
  const before = (a, b) => sign * (typeof a[shown.key] === 'number' ? a[shown.key] - b[shown.key]
    : String(a[shown.key]).localeCompare(String(b[shown.key])));
  const found = all.filter(fits).sort(before);
  const body = table.querySelector('tbody');
  body.replaceChildren();
  for (const row of found.slice(0, shown.most)) {
    const line = element('tr', undefined, body);
    for (const key of ['step', 'reward', 'tokens']) element('td', number(row[key]), line);
    for (const key of ['reason', 'prompt', 'completion', 'right answer']) {
      const cell = element('td', undefined, line);
      cell.className = 'text';
      element('div', row[key] + (key === 'reason' && row['cut off'] ? ' (cut off)' : ''), cell);
    }
    line.addEventListener('click', () => getSelection().toString() || line.classList.toggle('open'));
  }
  table.querySelector('output').textContent = `${Math.min(found.length, shown.most)} of ${found.length}`;
  table.querySelector('button').hidden = found.length <= shown.most;
  table.querySelectorAll('th').forEach(head => head.dataset.key === shown.key
    ? head.setAttribute('aria-sort', shown.down ? 'descending' : 'ascending') : head.removeAttribute('aria-sort'));
}
function steps() {
  const select = table.querySelector('[name=step]'), chosen = select.value;
  select.replaceChildren(new Option('all', ''));
  [...new Set(rows().map(row => row.step))].sort((a, b) => b - a).forEach(step => select.add(new Option(step, step)));
  select.value = chosen;
  // Nobody rewarded what a teacher alone looked at.
  table.classList.toggle('unrewarded', rows().every(row => row.reward === null));
}
if (table) {
  steps();
  table.querySelectorAll('[name]').forEach(input => input.addEventListener('input', () => { shown.most = 40; list(); }));
  table.querySelectorAll('th').forEach(head => head.addEventListener('click', () => {
    shown.down = shown.key === head.dataset.key ? !shown.down : true;
    shown.key = head.dataset.key;
    list();
  }));
  table.querySelector('button').addEventListener('click', () => { shown.most += 100; list(); });
  list();
}

// A live page takes what is new from the page as it is now.
async function renew() {
  const now = new DOMParser().parseFromString(await (await fetch('parts')).text(), 'text/html');
  const ids = [...now.querySelectorAll('.chart')].map(chart => chart.id);
  if (ids.join() !== charts.map(chart => chart.id).join() || !table !== !now.querySelector('.completions')) {
    location.reload();
    return;
  }
  for (const part of ['header', '.facts']) document.querySelector(part).replaceWith(now.querySelector(part));
  if (table) {
    table.querySelector('script').textContent = now.querySelector('.completions script').textContent;
    steps();
    list();
  }
  await window.report;
  for (const chart of charts) {
    const data = document.getElementById(chart.id + '-data'), newer = now.getElementById(chart.id + '-data');
    if (data.textContent === newer.textContent) continue;
    data.textContent = newer.textContent;
    await draw(chart);
  }
  document.documentElement.dataset.renewed = +(document.documentElement.dataset.renewed || 0) + 1;
}
if (document.body.dataset.live !== undefined) {
  const events = new EventSource('events');
  events.onmessage = event => event.data !== document.body.dataset.live && (document.body.dataset.live = event.data, renew());
}

// The grid of likeliest tokens: one colour scale over all completions, the lowest layer at the bottom.
const grid = document.querySelector('.grid');
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const visible = text => text.replaceAll(' ', '\u00b7').replaceAll('\n', '\u21b5').replaceAll('\t', '\u21e5');
function shade(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1), i = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const rgb = VIRIDIS[i].map((from, c) => Math.round(from + (VIRIDIS[i + 1][c] - from) * (place - i)));
  const light = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2];
  return [`rgb(${rgb})`, light > 130 ? '#111' : '#fff'];
}
function fill(name, options) {
  const select = grid.querySelector(`[name=${name}]`);
  options.forEach(([value, text]) => select.add(new Option(text, value)));
  select.parentElement.hidden = options.length < 2;
}
function cells(data) {
  const [completion, figure, tap, model, lens] =
    ['completion', 'figure', 'tap', 'model', 'lens'].map(name => grid.querySelector(`[name=${name}]`).value);
  // What is less what: two models, or the first through the other lens and through its own.
  const both = model === 'difference' || lens === 'difference';
  const sources = lens === 'own' ? data.models : lens === 'other' ? [data.other_lens] : [data.models[0], data.other_lens];
  const shownOf = both ? 1 : lens === 'own' ? +model : 0;
  // Fewer tokens, and perhaps fewer completions, were looked at through the other lens.
  const rowsOf = (m, c) => (sources[m][c] ?? {})[tap] ?? [];
  const value = (c, row, column) => {
    const of = m => { const x = rowsOf(m, c)[row][column][figure]; return figure === '3' ? Math.log10(x) : x; };
    const last = row === rowsOf(0, c).length - 1;
    if (figure === '1' && last) return 0;
    return both ? of(1) - of(0) : of(shownOf);
  };
  const all = [];
  data.completions.forEach((_, c) => rowsOf(shownOf, c).forEach((row, r) => row.forEach((_, t) => all.push(value(c, r, t)))));
  const finite = all.filter(x => typeof x === 'number' && isFinite(x));
  let low = Math.min(...finite), high = Math.max(...finite);
  if (both) { high = Math.max(Math.abs(low), Math.abs(high)); low = -high; }
  const shown = x => figure === '3' ? (both ? `x${(10 ** x).toPrecision(3)}` : Math.round(10 ** x)) : +x.toPrecision(3);
  grid.querySelector('[name=low]').textContent = shown(low);
  grid.querySelector('[name=high]').textContent = shown(high);
  const one = data.completions[completion];
  grid.querySelector('.prompt').textContent = one.prompt ? `prompt: ${one.prompt}` : '';
  const table = grid.querySelector('table'), texts = rowsOf(shownOf, completion);
  table.replaceChildren();
  if (!texts.length) grid.querySelector('.cell').textContent = 'The other lens looked at the first tokens only, none of this completion.';
  for (let r = texts.length - 1; r >= 0; r--) {
    const line = element('tr', undefined, table);
    element('th', r === texts.length - 1 ? 'final' : r + 1, line);
    texts[r].forEach((cell, t) => {
      const made = element('td', visible(cell[4] ?? ''), line), x = value(completion, r, t);
      const known = typeof x === 'number' && isFinite(x);
      if (known) [made.style.background, made.style.color] = shade(high > low ? (x - low) / (high - low) : 0);
      made.classList.toggle('same', cell[4] === one.tokens[t]);
      const say = () => {
        const name = r === texts.length - 1 ? 'final policy' : `layer ${r + 1}`;
        const lines = [`${name}, where ${visible(one.tokens[t])} is taken: entropy ${cell[0]} nats`
          + (cell[1] === null ? '' : `, KL to the final policy ${cell[1]} nats`)];
        for (let i = 4; i < cell.length; i += 2) lines.push(`${(100 * cell[i + 1]).toFixed(2).padStart(7)} %  ${visible(cell[i])}`);
        lines.push(`taken: rank ${cell[3]}, ${(100 * cell[2]).toPrecision(3)} %` + (both ? `; difference ${shown(x)}` : ''));
        grid.querySelector('.cell').textContent = lines.join('\n');
      };
      made.addEventListener('mouseenter', say);
      made.addEventListener('click', say);
    });
  }
  const foot = element('tr', undefined, table);
  element('th', 'token', foot);
  one.tokens.forEach(token => element('th', visible(token), foot));
}
if (grid) {
  const data = JSON.parse(grid.querySelector('script').textContent);
  const names = { layer_out: 'the layer', attn_out: 'attention', ffn_out: 'FFN' };
  fill('completion', data.completions.map((c, i) => [i, c.title]));
  fill('tap', Object.keys(data.models[0][0]).map(tap => [tap, names[tap]]));
  fill('model', data.models.length > 1 ? [['0', 'first'], ['1', 'second'], ['difference', 'second less first']] : [['0', 'first']]);
  const [raw, normed] = ['without final norm', 'with final norm'];
  const [own, other] = data.final_norm ? [normed, raw] : [raw, normed];
  fill('lens', data.other_lens.length ? [['own', own], ['other', other], ['difference', `${other} less ${own}`]] : [['own', own]]);
  // The other lens knows the first model alone.
  const [model, lens] = ['model', 'lens'].map(name => grid.querySelector(`[name=${name}]`));
  model.addEventListener('input', () => { if (model.value !== '0') lens.value = 'own'; });
  lens.addEventListener('input', () => { if (lens.value !== 'own') model.value = '0'; });
  grid.querySelectorAll('select').forEach(select => select.addEventListener('input', () => cells(data)));
  cells(data);
}
