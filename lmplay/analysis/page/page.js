"use strict";
// Numbers first: as lmplay/compare.py has them, which a test compares.

function commonGrid(xs, points) {
  const low = Math.max(...xs.map((x) => x[0])),
    high = Math.min(...xs.map((x) => x[x.length - 1]));
  if (!(low <= high)) return [];
  const inside = xs[0].filter((v) => v >= low && v <= high);
  if (
    inside.length &&
    inside[inside.length - 1] === high &&
    xs.slice(1).every((x) => {
      const have = new Set(x);
      return inside.every((v) => have.has(v));
    })
  )
    return inside;
  if (low === high) return [low];
  const even = (i) => i / (points - 1);
  return Array.from({ length: points }, (_, i) =>
    i === points - 1
      ? high
      : low > 0
        ? low * (high / low) ** even(i)
        : low + (high - low) * even(i),
  );
}

function interpolate(grid, x, y) {
  let j = 0;
  return grid.map((v) => {
    while (j < x.length - 2 && x[j + 1] < v) j++;
    if (v <= x[0]) return y[0];
    if (v >= x[x.length - 1]) return y[y.length - 1];
    return y[j] + ((y[j + 1] - y[j]) * (v - x[j])) / (x[j + 1] - x[j]);
  });
}

function smooth(y, count) {
  let sum = 0;
  return y.map((v, i) => {
    sum += v;
    if (i >= count) sum -= y[i - count];
    return sum / Math.min(i + 1, count);
  });
}

function difference(run, base, points) {
  const x = commonGrid([run.x, base.x], points);
  const mine = interpolate(x, run.x, run.y),
    other = interpolate(x, base.x, base.y);
  return { x, y: mine.map((v, i) => v - other[i]) };
}

function band(lines, quantiles, points) {
  const furthest = Math.max(...lines.map((l) => l.x[l.x.length - 1]));
  // One that has just begun would end it there.
  lines = lines.filter((l) => l.x[l.x.length - 1] >= furthest / 2);
  if (lines.length < 2) return null;
  const x = commonGrid(
      lines.map((l) => l.x),
      points,
    ),
    n = lines.length;
  if (!x.length) return null;
  const ys = lines.map((l) => interpolate(x, l.x, l.y));
  const mean = x.map((_, i) => ys.reduce((s, y) => s + y[i], 0) / n);
  const t = quantiles[Math.min(n - 2, quantiles.length - 1)];
  const half = x.map(
    (_, i) =>
      (t * Math.sqrt(ys.reduce((s, y) => s + (y[i] - mean[i]) ** 2, 0) / (n - 1))) / Math.sqrt(n),
  );
  return { x, mean, half, seeds: n };
}

function nullBand(lines, quantiles, points) {
  const found = band(lines, quantiles, points);
  if (found === null) return null;
  const half = found.half.map((h) => h * Math.sqrt(2 * found.seeds));
  return { x: found.x, mean: half.map(() => 0), half, seeds: found.seeds };
}

// What is shown.

let content = JSON.parse(document.getElementById("content").textContent);
const hidden = new Set(); // families that were unchecked, by arena and name
let sorting = { column: "loss", down: false };
const $ = (id) => document.getElementById(id);
// Plotly reads a little HTML in names and hovers: none of it comes from a run.
const escaped = (text) =>
  String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function options(select, entries) {
  const before = select.value;
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => value === before)) select.value = before;
}

const arena = () => content.arenas.find((a) => a.key === $("arena").value) || content.arenas[0];
const key = (family) => arena().key + " " + family;
const chosenTexts = new Map(); // which of a run's texts is shown, by arena and run
const short = (v) =>
  v === null || v === undefined
    ? "–"
    : Math.abs(v) >= 1e4
      ? v.toLocaleString("en", { maximumSignificantDigits: 4, notation: "compact" })
      : String(+v.toPrecision(5));
const signed = (v) => (v < 0 ? "−" : "+") + Math.abs(v).toFixed(4);

function series(
  run,
  kind = $("kind").value,
  axis = $("x").value,
  metric = $("metric").value,
  smoothing = Number($("smooth").value),
) {
  const data = run[kind],
    column = content.axes[axis];
  if (!data || !data[column] || !data[metric]) return null;
  const x = [],
    y = [];
  data[column].forEach((v, i) => {
    if (v === null || data[metric][i] === null) return;
    if (x.length && v <= x[x.length - 1]) {
      y[y.length - 1] = data[metric][i];
      return;
    }
    x.push(v);
    y.push(data[metric][i]);
  });
  return x.length ? { x, y: smooth(y, smoothing), window: data.window } : null;
}

function found(run) {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = [run.name, run.variant, ...Object.entries(run.settings).map(([k, v]) => k + "=" + v)]
    .join(" ")
    .toLowerCase();
  return words.every((w) => text.includes(w));
}

// As partners() of lmplay/compare.py.
function partner(run, family) {
  const here = arena(),
    first = here.runs.find((r) => r.family === family);
  if (!first) return null;
  if (here.fixed && family === here.baseline)
    return here.runs.find((r) => r.name === here.fixed) || first;
  const same = here.runs.filter((r) => r.setting === first.setting && r.seed === run.seed);
  return same.find((r) => r.precision === run.precision) || same[0] || first;
}

// Settings that are not the same in all runs of the plan.
function differing() {
  const values = new Map(),
    runs = arena().runs;
  for (const run of runs)
    for (const [k, v] of Object.entries(run.settings))
      values.set(k, (values.get(k) || new Set()).add(String(v)));
  return [...values.keys()].filter(
    (k) => values.get(k).size > 1 || runs.some((r) => !Object.hasOwn(r.settings, k)),
  );
}

function looks() {
  const names = [...new Set(arena().runs.map((r) => r.family))],
    others = names.filter((n) => n !== $("baseline").value);
  const dashes = ["solid", "dash", "dashdot", "dot"],
    n = content.colors.length,
    made = Object.create(null);
  others.forEach((name, i) => {
    made[name] = { color: content.colors[i % n], dash: dashes[Math.floor(i / n) % 4] };
  });
  for (const name of names) made[name] ||= { color: content.grey, dash: "solid" };
  return made;
}

function lines() {
  const base = $("baseline").value,
    diff = $("view").value === "diff" && base !== "";
  const groups = new Map();
  for (const run of arena().runs) {
    if (!found(run)) continue;
    let line = series(run),
      pair = null;
    if (line && diff) {
      pair = partner(run, base);
      if (pair === run) continue;
      const other = pair && series(pair);
      if (!other) continue;
      line = { ...difference(line, other, content.grid), window: line.window };
    }
    if (!line || !line.x.length) continue;
    if ($("logx").checked && line.x[line.x.length - 1] <= 0) continue;
    if (!groups.has(run.family)) groups.set(run.family, []);
    groups.get(run.family).push({ run, pair, ...line });
  }
  return { groups, diff, base };
}

function layout(x, y, more) {
  const axis = {
    gridcolor: color("--line"),
    zerolinecolor: color("--dim"),
    linecolor: color("--line"),
    automargin: true,
  };
  return {
    paper_bgcolor: color("--ground"),
    plot_bgcolor: color("--ground"),
    showlegend: false,
    hovermode: "closest",
    font: { color: color("--text"), family: "system-ui, sans-serif" },
    margin: { l: 60, r: 20, t: 42, b: 45 }, // the toolbar is above the curves
    xaxis: { ...axis, title: { text: x } },
    yaxis: { ...axis, title: { text: y } },
    ...more,
  };
}

const plotly = {
  responsive: true,
  displaylogo: false,
  modeBarButtonsToRemove: ["lasso2d", "select2d"],
};

// Until plotly is there the rest of the page can be read.
function plot(where, traces, layout) {
  if (window.Plotly) Plotly.react(where, traces, layout, plotly);
}

function area(x, low, high, fill, name) {
  return {
    x: [...x, ...x.toReversed()],
    y: [...high, ...low.toReversed()],
    fill: "toself",
    fillcolor: fill,
    mode: "lines",
    line: { width: 0 },
    hoverinfo: "skip",
    name: escaped(name),
  };
}

function transparent(hex, alpha) {
  const n = parseInt(hex.slice(1), 16);
  return `rgba(${n >> 16}, ${(n >> 8) & 255}, ${n & 255}, ${alpha})`;
}

function withRoom(low, high) {
  const room = 0.06 * (high - low) || Math.abs(high) * 0.01 || 0.01;
  return [low - room, high + room];
}

// Lines at 1 to 9 times the powers of ten, with as many numbers as there is room for.
function logTicks(axis, values) {
  const positive = values.filter((v) => v > 0),
    low = positive.reduce((m, v) => Math.min(m, v), Infinity),
    high = positive.reduce((m, v) => Math.max(m, v), 0);
  if (!positive.length) return;
  const decades = Math.log10(high / low) * (window.innerWidth < 640 ? 2.5 : 1),
    named = decades < 0.7 ? [1, 2, 3, 4, 5, 6, 7, 8, 9] : decades < 4 ? [1, 2, 5] : [1];
  axis.tickvals = [];
  axis.ticktext = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high) + 1; power++)
    for (let digit = 1; digit <= (decades < 6 ? 9 : 1); digit++) {
      const value = digit * 10 ** power;
      axis.tickvals.push(value);
      axis.ticktext.push(named.includes(digit) ? si(value) : "");
    }
}

// 5k, 20M, 0.5
function si(value) {
  const units = ["", "k", "M", "G", "T", "P", "E", "Z"],
    unit = Math.min(7, Math.max(0, Math.floor(Math.log10(value) / 3 + 1e-9)));
  return String(+(value / 1000 ** unit).toPrecision(3)) + units[unit];
}

const strokes = { solid: "—", dash: "- -", dashdot: "- ·", dot: "· · ·" };

// Names at the ends of the curves, moved apart where they would overlap. Phones have no room.
function labelEnds(made, ends, look, logx) {
  const shown = [...ends].filter(([name]) => !hidden.has(key(name)));
  if (!made.yaxis.range || window.innerWidth < 900 || shown.length > content.colors.length) return;
  const [low, high] = made.yaxis.range,
    log = made.yaxis.type === "log",
    height = Math.max(100, $("figure").clientHeight - made.margin.t - made.margin.b);
  const at = (v) => (((log ? Math.log10(v) : v) - low) / (high - low)) * height;
  made.margin.r = 40 + 7 * Math.max(0, ...shown.map(([name]) => Math.min(30, name.length)));
  let below = -Infinity;
  made.annotations = shown
    .sort((a, b) => a[1].mean - b[1].mean)
    .map(([name, end]) => {
      const y = at(end.mean),
        place = Math.max(y, below + 16);
      below = place;
      return {
        x: logx ? Math.log10(end.x) : end.x,
        y: log ? Math.log10(end.mean) : end.mean,
        xanchor: "left",
        xshift: 4,
        yshift: place - y,
        showarrow: false,
        text: `${strokes[look[name].dash]} ${escaped(name.slice(0, 30))}`,
        font: { color: look[name].color, size: 12 },
      };
    });
}

// The losses of count tables that are near the curves.
function tableLines(groups, shown, logx) {
  const values = shown.flat().filter(Number.isFinite),
    low = values.reduce((m, v) => Math.min(m, v), Infinity) / 1.1,
    high = values.reduce((m, v) => Math.max(m, v), -Infinity) * 1.1,
    xs = [...groups.values()].flat().flatMap((s) => s.x).filter((x) => !logx || x > 0),
    ends = [xs.reduce((m, x) => Math.min(m, x), Infinity), xs.reduce((m, x) => Math.max(m, x), 0)];
  return Object.entries(arena().tables)
    .filter(([, loss]) => low < loss && loss < high)
    .map(([name, loss]) => ({
      x: ends,
      y: [loss, loss],
      mode: "lines+text",
      name: `${name} table`,
      text: [`${name} table ${loss.toFixed(2)}`, ""],
      textposition: "top right",
      textfont: { color: content.grey, size: 11 },
      line: { color: content.grey, width: 1, dash: "dash" },
      hovertemplate: `%{y:.4f}: table of ${name} counts<extra></extra>`,
    }));
}

function draw() {
  const { groups, diff, base } = lines(),
    look = looks(),
    traces = [],
    keys = differing();
  const metric = content.labels[$("metric").value],
    logx = $("logx").checked;
  let null_ = null,
    windows = new Set(),
    unpaired = 0;
  if (diff) {
    null_ = nullBand(
      arena()
        .runs.filter((r) => r.family === base)
        .map((r) => series(r))
        .filter(Boolean),
      content.quantiles,
      content.grid,
    );
    if (null_) {
      const at = null_.x.map((v, i) => i).filter((i) => !logx || null_.x[i] > 0),
        half = at.map((i) => null_.half[i]);
      traces.push(
        area(
          at.map((i) => null_.x[i]),
          half.map((h) => -h),
          half,
          transparent(content.grey, 0.3),
          "luck",
        ),
      );
    }
  }
  const ends = new Map(),
    shown = [];
  for (const [name, seeds] of groups) {
    const total = band(seeds, content.quantiles, content.grid),
      { color: hue, dash } = look[name];
    for (const s of seeds) {
      windows.add(s.window);
      if (s.pair && s.pair.seed !== s.run.seed) unpaired++;
    }
    const last = (v) => v[v.length - 1];
    const furthest = seeds.reduce((a, b) => (last(b.x) > last(a.x) ? b : a));
    ends.set(
      name,
      total
        ? {
            mean: last(total.mean),
            half: last(total.half),
            seeds: total.seeds,
            of: seeds.length,
            x: last(total.x),
          }
        : { mean: last(furthest.y), half: null, seeds: 1, of: seeds.length, x: last(furthest.x) },
    );
    if (hidden.has(key(name))) continue;
    shown.push(...seeds.map((s) => s.y));
    if (total)
      traces.push(
        area(
          total.x,
          total.mean.map((m, i) => m - total.half[i]),
          total.mean.map((m, i) => m + total.half[i]),
          transparent(hue, 0.14),
          name,
        ),
      );
    for (const s of seeds) {
      const text = keys
        .filter((k) => Object.hasOwn(s.run.settings, k))
        .map((k) => `${k}=${s.run.settings[k]}`);
      const hover = [s.run.name, ...(s.pair ? [`against ${s.pair.name}`] : []), ...text]
        .map(escaped)
        .join("<br>");
      traces.push({
        x: s.x,
        y: s.y,
        mode: s.x.length === 1 ? "markers" : "lines",
        name: escaped(s.run.name),
        opacity: total ? 0.4 : 1,
        line: { color: hue, width: total ? 1 : 2.2, dash: total ? "solid" : dash },
        hovertemplate: `%{y:.4f} at %{x:.4s}<br>${hover}<extra></extra>`,
      });
    }
    if (total)
      traces.push({
        x: total.x,
        y: total.mean,
        mode: "lines",
        name: escaped(name),
        line: { color: hue, width: 2.6, dash },
        hovertemplate: `${escaped(name)}: mean %{y:.4f} of ${total.seeds} seeds ` +
          "at %{x:.4s}<extra></extra>",
      });
  }
  if (!diff && $("metric").value === "loss") traces.push(...tableLines(groups, shown, logx));
  const bounds = [];
  for (const [name, seeds] of groups) {
    const total = hidden.has(key(name)) ? null : band(seeds, content.quantiles, content.grid);
    total?.mean.forEach((m, i) => {
      if (!logx || total.x[i] > 0) bounds.push(m - total.half[i], m + total.half[i]);
    });
  }
  const better = $("metric").value === "accuracy" ? "higher is better" : "lower is better";
  const title = diff ? `${metric}, difference to ${escaped(base)}` : metric;
  const made = layout(content.labels[$("x").value], `${title}<br>(${better})`, {});
  made.xaxis.type = logx ? "log" : "linear";
  made.yaxis.type = $("logy").checked && !diff ? "log" : "linear";
  made.xaxis.tickformat = "~s"; // 5k, 10k, 20k
  if (logx) logTicks(made.xaxis, [...groups.values()].flat().flatMap((s) => s.x));
  if (diff && shown.length) {
    // The first wild points of single runs must not hide the rest; a mean and its band may.
    const late = shown.flatMap((y) => y.slice(Math.floor(y.length / 3))),
      all = shown.flat();
    const spread =
      3 *
      Math.max(
        1e-9,
        late.reduce((m, v) => Math.max(m, Math.abs(v)), 0),
      );
    const low = Math.min(
      bounds.reduce((m, v) => Math.min(m, v), 0),
      Math.max(
        all.reduce((m, v) => Math.min(m, v), 0),
        -spread,
      ),
    );
    const high = Math.max(
      bounds.reduce((m, v) => Math.max(m, v), 0),
      Math.min(
        all.reduce((m, v) => Math.max(m, v), 0),
        spread,
      ),
    );
    made.yaxis.range = withRoom(low, high);
  } else if (shown.length) {
    const log = made.yaxis.type === "log",
      all = [...shown.flat(), ...bounds].filter((v) => !log || v > 0).map((v) =>
        log ? Math.log10(v) : v,
      );
    made.yaxis.range = withRoom(
      all.reduce((m, v) => Math.min(m, v), Infinity),
      all.reduce((m, v) => Math.max(m, v), -Infinity),
    );
  }
  if (made.yaxis.range && made.yaxis.type === "linear") {
    const step = (made.yaxis.range[1] - made.yaxis.range[0]) / 6; // equal digits
    made.yaxis.tickformat = `.${Math.max(0, Math.ceil(-Math.log10(step)))}f`;
  }
  labelEnds(made, ends, look, logx);
  made.uirevision = [
    $("arena").value,
    $("view").value,
    base,
    $("metric").value,
    $("x").value,
    $("kind").value,
  ].join();
  plot($("figure"), traces, made);
  say(groups, diff, base, null_, windows, unpaired);
  families(ends, look, diff);
  table(diff ? base : $("baseline").value);
}

function say(groups, diff, base, null_, windows, unpaired) {
  const parts = [],
    count = Number($("smooth").value),
    window = Math.max(1, ...windows);
  if (!groups.size)
    parts.push("Nothing to draw: no run matches the search or has this metric on this axis.");
  if (window > 1)
    parts.push(
      `Each point is the mean of ${window} ` +
        ($("kind").value === "train" ? "steps." : "validations."),
    );
  parts.push(
    count > 1
      ? `Smoothed, all curves alike: the mean of the last ${count} points.`
      : "Not smoothed.",
  );
  const single = [...groups].filter(([, s]) => s.length === 1).map(([name]) => name);
  if (groups.size > single.length)
    parts.push("Bands: Student's 95 % interval of the mean over seeds; faint: single seeds.");
  if (single.length) parts.push(`Single seed: no claim (${single.join(", ")}).`);
  if (diff)
    parts.push(
      null_
        ? `Grey: 95 % of the differences between two runs of ${base} ` +
          `with other seeds (${null_.seeds} seeds).`
        : `One seed of ${base}: its luck is unknown.`,
    );
  if (unpaired)
    parts.push(
      `${unpaired} run${unpaired > 1 ? "s have" : " has"} no ${base} of the same seed ` +
        "and is compared with another.",
    );
  if (!diff && $("view").value === "diff") parts.push("No baseline: the value is shown.");
  if (diff && $("logy").checked)
    parts.push("A difference has no logarithm: log y applies to the value.");
  $("statement").textContent = parts.join(" ");
}

const borders = { solid: "solid", dash: "dashed", dashdot: "double", dot: "dotted" };

function families(ends, look, diff) {
  const focused = document.activeElement?.dataset?.family;
  const furthest = Math.max(...[...ends.values()].map((e) => e.x));
  $("families").replaceChildren(
    ...[...ends].map(([name, end]) => {
      const label = element("label"),
        box = element("input"),
        swatch = element("span", undefined, "swatch");
      box.type = "checkbox";
      box.checked = !hidden.has(key(name));
      box.dataset.family = name;
      box.addEventListener("change", () => {
        box.checked ? hidden.delete(key(name)) : hidden.add(key(name));
        draw();
      });
      swatch.style.borderTop = `0.25rem ${borders[look[name].dash]} ${look[name].color}`;
      const value = diff ? signed(end.mean) : end.mean.toFixed(4);
      const seeds =
        end.seeds === end.of
          ? `${end.seeds} seeds`
          : `${end.seeds} of ${end.of} seeds came far enough`;
      const spread =
        (end.half !== null
          ? `± ${end.half.toFixed(4)}, ${seeds}`
          : end.of > 1
            ? `${seeds}: no claim`
            : "single seed: no claim") +
        (end.x < 0.99 * furthest ? `, at ${short(end.x)} ${content.labels[$("x").value]}` : "");
      label.append(
        box,
        swatch,
        element("span", name),
        element("span", `${value} (${spread})`, "dim"),
      );
      return label;
    }),
  );
  if (focused !== undefined)
    [...$("families").querySelectorAll("input")].find((b) => b.dataset.family === focused)?.focus();
}

const columns = [
  ["run", "run"],
  ["seed", "seed"],
  ["tokens", "tokens"],
  ["loss", "loss"],
  ["bpb", "bpb"],
  ["accuracy", "accuracy"],
  ["delta", "difference in loss"],
  ["parameters", "parameters"],
  ["seconds", "seconds"],
  ["tokens_per_second", "tokens/s"],
  ["peak_memory_mb", "memory (MB)"],
  ["state", "state"],
];

function delta(run, base) {
  const other = base === "" ? null : partner(run, base);
  if (!other || other === run || run.final.loss === null || other.final.loss === null) return null;
  const [mine, theirs] = [run, other].map((r) => series(r, "validate", "tokens", "loss", 1));
  if (!mine || !theirs) return null;
  const made = difference(mine, theirs, content.grid);
  return made.y.length ? made.y[made.y.length - 1] : null;
}

function table(base) {
  const rows = arena()
    .runs.filter(found)
    .map((run) => ({
      ...run.final,
      run: run.name,
      seed: run.seed,
      delta: delta(run, base),
      state:
        (run.finished ? "finished" : "not finished") +
        (run.final.loss === null ? ", loss not finite" : ""),
    }));
  const { column, down } = sorting,
    order = down ? -1 : 1;
  rows.sort((a, b) => {
    const [u, v] = [a[column], b[column]];
    if (u === null || u === undefined) return 1;
    if (v === null || v === undefined) return -1;
    return (
      order *
      (typeof u === "number" && typeof v === "number" ? u - v : String(u).localeCompare(String(v)))
    );
  });
  const head = element("tr"),
    focused = document.activeElement?.dataset?.column;
  for (const [id, title] of columns) {
    const th = element("th"),
      button = element("button", title + (id === column ? (down ? " ▼" : " ▲") : ""));
    th.scope = "col";
    th.ariaSort = id === column ? (down ? "descending" : "ascending") : "none";
    button.type = "button";
    button.dataset.column = id;
    button.addEventListener("click", () => {
      sorting = { column: id, down: id === sorting.column && !sorting.down };
      table(base);
    });
    th.append(button);
    head.append(th);
  }
  $("final").tHead.replaceChildren(head);
  $("final").tBodies[0].replaceChildren(
    ...rows.map((row) => {
      const tr = element("tr");
      for (const [id] of columns) {
        const v = row[id];
        const text =
          v === null || v === undefined
            ? "–"
            : id === "delta"
              ? signed(v)
              : ["loss", "bpb", "accuracy"].includes(id)
                ? v.toFixed(4)
                : typeof v === "number" && id !== "seed"
                  ? short(v)
                  : String(v);
        tr.append(element("td", text, id === "state" ? "left" : ""));
      }
      return tr;
    }),
  );
  if (focused) $("final").querySelector(`[data-column="${focused}"]`)?.focus();
}

function verdicts() {
  const cards = [];
  for (const trial of content.trials)
    for (const [arm, v] of Object.entries(trial.arms)) {
      const d = trial.design,
        card = element("article", undefined, "card"),
        end = (x) => (x === null ? "unknown" : signed(x));
      if (["REAL", "HARMFUL", "UNDECIDED"].includes(v.word)) card.classList.add(v.word);
      const line = (text) => card.append(element("p", text));
      card.append(
        element(
          "h3",
          `${arm} against ${d.against} on ${d.plan}` + (d.context ? `, ${d.context}` : ""),
        ),
        element("p", v.word, "word"),
      );
      line(
        v.why +
          (v.tuned ? "" : "; untuned: every arm at the plan's learning rate") +
          (trial.over ? "" : "; the trial is not over"),
      );
      if (v.gain !== null)
        line(
          `gain ${signed(v.gain)} nats per token (${end(v.low)} to ${end(v.high)}), ` +
            `${end(v.gain_bpb)} bits per byte`,
        );
      line(`${v.pairs} pairs, p ${short(v.p)} of the ${short(v.level)} that this look may spend`);
      if (v.settings) line(`tuned: ${v.settings.replaceAll(",", ", ")}`);
      else if (v.tuned) line(`learning rate × ${short(v.lr_multiplier)}`);
      if (v.share !== 1) line(`${short(v.share)} times the baseline's tokens`);
      if (v.tokens_ratio)
        line(`${d.against} needs ${v.tokens_ratio.toFixed(2)} times the tokens for the same loss`);
      if (v.deviation_paired !== null)
        line(
          `standard deviation of the difference: paired ${short(v.deviation_paired)}, ` +
            `unpaired ${short(v.deviation_unpaired)}`,
        );
      for (const [control, values] of Object.entries(v.controls))
        line(
          `against the baseline of equal ${control}: ` +
            signed(-values.reduce((s, x) => s + x, 0) / values.length) +
            ` (${values.length} seeds)`,
        );
      if (v.more === 0) line("it is close: some more pairs may settle it");
      if (v.more) line(`about ${v.more} more pair${v.more > 1 ? "s" : ""} would settle it`);
      line(`${trial.cost.runs} runs, ${trial.cost.hours.toFixed(2)} hours of training`);
      line(trial.certificate.sentence || "uncertified arena");
      cards.push(card);
    }
  for (const panel of content.panels)
    for (const [arm, found] of Object.entries(panel.panel)) {
      const card = element("article", undefined, "card");
      card.append(
        element("h3", `${panel.name}: ${arm} over contexts`),
        element("p", found.sentence),
      );
      cards.push(card);
    }
  for (const sizes of content.sizes)
    for (const [arm, fit] of Object.entries(sizes.fits)) {
      const card = element("article", undefined, "card");
      card.append(element("h3", `${sizes.name}: ${arm} over sizes`), element("p", fit.sentence));
      for (const [flops, gain] of fit.points)
        card.append(element("p", `at ${flops.toExponential(2)} FLOPs: gain ${signed(gain)}`));
      cards.push(card);
    }
  for (const trial of content.trials)
    if (!Object.keys(trial.arms).length) {
      const card = element("article", undefined, "card UNDECIDED");
      card.append(
        element("h3", trial.name),
        element("p", `no verdict yet: ${trial.cost.runs} runs done`),
      );
      cards.push(card);
    }
  $("verdicts").replaceChildren(...cards);
  $("verdicts-section").hidden = !cards.length && !content.trials.length;
  const tried = content.trials
    .filter((t) => Object.values(t.sensitivity).some((v) => v.length))
    .map((t) => [t.name, t.name]);
  options($("trial"), tried);
  $("sensitivity-part").hidden = !tried.length;
  if (tried.length) sensitivity();
}

function sensitivity() {
  const trial = content.trials.find((t) => t.name === $("trial").value),
    traces = [];
  Object.entries(trial.sensitivity).forEach(([arm, tries], i) => {
    const hue =
      arm === trial.design.against
        ? content.grey
        : content.colors[(i + content.colors.length - 1) % content.colors.length];
    [...new Set(tries.map((t) => t[0]))].forEach((share, j, shares) => {
      const of = tries.filter((t) => t[0] === share && t[2] !== null);
      traces.push({
        x: of.map((t) => t[1]),
        y: of.map((t) => t[2]),
        mode: "lines+markers",
        opacity: (j + 1) / shares.length,
        line: { color: hue },
        name: `${escaped(arm)}, ${short(share)} of the budget`,
        hovertemplate: "%{y:.4f} at %{x} times the plan's rate<br>" +
          `${escaped(arm)}, ${short(share)} of the budget<extra></extra>`,
      });
    });
  });
  const made = layout("multiple of the plan's learning rates", "loss (nats per token)", {
    showlegend: true,
  });
  made.xaxis.type = "log";
  made.xaxis.tickvals = [1 / 64, 1 / 16, 1 / 4, 1, 4, 16, 64];
  made.xaxis.ticktext = ["1/64", "1/16", "1/4", "1", "4", "16", "64"];
  made.legend = window.innerWidth < 640 ? { orientation: "h", y: -0.5 } : {};
  plot($("sensitivity"), traces, made);
}

function samples() {
  const runs = arena().runs.filter((r) => found(r) && r.samples.length);
  $("samples-section").hidden = !arena().runs.some((r) => r.samples.length);
  $("samples").replaceChildren(
    ...runs.slice(0, 24).map((run) => {
      const card = element("article", undefined, "card"),
        label = element("label", "at "),
        choice = element("select"),
        text = element("pre");
      card.append(element("h3", run.name), label, text);
      label.append(choice);
      options(
        choice,
        run.samples.map((s, i) => [String(i), `${short(s.tokens)} tokens`]),
      );
      const show = () => {
          text.textContent = run.samples[Number(choice.value)].text;
        },
        held = chosenTexts.get(key(run.name));
      choice.value = run.samples[held] ? String(held) : String(run.samples.length - 1);
      choice.addEventListener("change", () => {
        chosenTexts.set(key(run.name), Number(choice.value));
        show();
      });
      show();
      return card;
    }),
    ...(runs.length > 24 ? [element("p", `${runs.length - 24} more: search for them above.`)] : []),
  );
}

function chooseArena() {
  const names = [...new Set(arena().runs.map((r) => r.family))],
    held = $("baseline").value;
  options($("baseline"), [...names.map((n) => [n, n]), ["", "none"]]);
  if (!names.includes(held)) $("baseline").value = arena().baseline ?? "";
  if (names.length < 2) $("view").value = "value";
  draw();
  samples();
}

// Of a plan, and of its data where they are known.
const shortly = (fingerprint) =>
  fingerprint
    .split("-")
    .map((part) => part.slice(0, 6))
    .filter(Boolean)
    .join("-");

function fill() {
  const twice = (a) => content.arenas.filter((b) => b.name === a.name).length > 1;
  options(
    $("arena"),
    content.arenas.map((a) => [a.key, twice(a) ? `${a.name} (${shortly(a.fingerprint)})` : a.name]),
  );
  options(
    $("metric"),
    content.metrics.map((m) => [m, content.labels[m]]),
  );
  options(
    $("x"),
    Object.keys(content.axes).map((x) => [x, content.labels[x]]),
  );
  $("made").textContent = (content.live ? "live, " : "") + "as of " + content.made;
  $("curves-section").hidden = !content.arenas.length;
  verdicts();
  if (content.arenas.length) chooseArena();
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
}

setTheme(
  content.preset?.theme ??
    (window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"),
);
$("theme").addEventListener("click", () => {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  verdicts();
  if (content.arenas.length) draw();
});
$("arena").addEventListener("change", () => {
  $("baseline").value = "";
  $("baseline").replaceChildren();
  $("view").value = "diff";
  chooseArena();
});
for (const id of ["view", "baseline", "metric", "x", "kind", "smooth", "logx", "logy"])
  $(id).addEventListener("change", draw);
$("search").addEventListener("input", () => {
  draw();
  samples();
});
$("controls").addEventListener("submit", (e) => e.preventDefault());
$("trial").addEventListener("change", sensitivity);
fill();
if (content.preset) {
  $("x").value = content.preset.x;
  $("kind").value = content.preset.kind;
  if (content.arenas.length) draw();
}

// Plotly takes a second or two to start: only after everything else was painted.
document.addEventListener("DOMContentLoaded", () =>
  requestAnimationFrame(() =>
    setTimeout(() => {
      performance.mark("read");
      const script = element("script", $("plotly").textContent);
      document.head.append(script);
      verdicts();
      if (content.arenas.length) draw();
      performance.mark("figure");
    }),
  ),
);

if (content.live) {
  let version = content.version;
  setInterval(async () => {
    if (document.hidden) return;
    try {
      const answer = await fetch("data.json", {
        headers: { "If-None-Match": version },
        cache: "no-store",
      });
      if (answer.status === 304) $("made").textContent = "live, as of " + content.made;
      else if (answer.status === 200) {
        version = answer.headers.get("ETag");
        content = await answer.json();
        fill();
      } else
        $("made").textContent =
          `the server reports a problem (${(await answer.text()).trim()}); as of ${content.made}`;
    } catch (e) {
      $("made").textContent = "the server is gone; as of " + content.made;
    }
  }, 3000);
}
window.lmplay = {
  commonGrid,
  interpolate,
  smooth,
  difference,
  band,
  nullBand,
  content: () => content,
};
