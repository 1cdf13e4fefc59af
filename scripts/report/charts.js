"use strict";

// Draws the charts of the page, and shows the values under the pointer.
//
// A chart is {lines, unit, log, top, x}, and a line {name, color, dash, x, y, trend, low, high}. The
// trend is drawn over the faint y, low and high bound a band, and high alone an area that begins at
// zero. null is a gap. A chart of class `spark` has lines only, and no axes.

const MARGIN = { left: 48, right: 8, top: 8, bottom: 22 };
const NO_MARGIN = { left: 0, right: 0, top: 2, bottom: 2 };
const MOST_MARKERS = 40;
const SUFFIXES = [[1e9, "B"], [1e6, "M"], [1e3, "k"]];

function short(value, unit, digits) {
  if (unit === "%") return `${+(100 * value).toPrecision(digits)}%`.replace("-", "−");
  const [scale, suffix] = SUFFIXES.find(([scale]) => Math.abs(value) >= 10 * scale) || [1, ""];
  return (+(value / scale).toPrecision(digits) + suffix).replaceAll("-", "−");
}

function create(name, parent, style = {}, text = "") {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(style)) element.style.setProperty(key, value);
  element.append(text);
  parent.append(element);
  return element;
}

// Scales and ticks

/** Maps low…high to the pixels from…to. What lies outside is drawn at the edge. */
function makeScale(low, high, from, to, log = false) {
  const measure = log ? Math.log10 : (value) => value;
  const share = (value) => (measure(value) - measure(low)) / (measure(high) - measure(low));
  return (value) => from + Math.min(1, Math.max(0, share(value))) * (to - from);
}

/** The extent of the values, and a share of it on either side. */
function padded(values, share) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  // A constant has no extent.
  const pad = share * (high - low || Math.abs(high) || 1);
  return [low - pad, high + pad];
}

/** About `count` round numbers between low and high. */
function linearTicks(low, high, count, whole = false) {
  const least = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(least));
  let step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= least);
  if (whole) step = Math.ceil(step);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high) {
  const decades = Math.log10(high / low);
  if (decades < 0.8) return linearTicks(low, high, 4);
  const factors = decades < 2 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let i = Math.floor(Math.log10(low)); 10 ** i <= high; i += Math.ceil(decades / 7)) {
    ticks.push(...factors.map((factor) => factor * 10 ** i));
  }
  return ticks.filter((tick) => low <= tick && tick <= high);
}

class Plot {
  constructor(box) {
    this.box = box;
    this.svg = box.querySelector("svg");
    this.chart = JSON.parse(box.dataset.plot);
    this.bare = box.classList.contains("spark");
    this.margin = this.bare ? NO_MARGIN : MARGIN;
    this.stops = this.chart.lines.flatMap((line) => this.pieces(line, line.y).flat()).map(([x]) => x);
    this.marks = [];
    this.draw();
    // Drawn again at another width, so that text keeps its size. In closed details it is 0.
    new ResizeObserver(() => this.width === this.measure().width || this.draw()).observe(box);
    if (this.bare) return;
    box.addEventListener("pointermove", (event) => {
      this.point(this.nearest(event.clientX - box.getBoundingClientRect().left));
    });
    box.addEventListener("pointerleave", () => this.clear());
  }

  canShow(value) {
    return value !== null && (!this.chart.log || value > 0);
  }

  /** A series as [x, value, index] in pieces, which gaps divide. */
  pieces(line, values) {
    const found = [[]];
    line.x.forEach((x, i) => {
      if (x !== null && this.canShow(values[i])) found.at(-1).push([x, values[i], i]);
      else found.push([]);
    });
    return found.filter((piece) => piece.length);
  }

  measure() {
    const { width, height } = this.svg.getBoundingClientRect();
    return { width, height };
  }

  draw() {
    Object.assign(this, this.measure());
    this.svg.replaceChildren();
    const ticks = this.setScales();
    if (!this.bare) this.drawAxes(...ticks);
    // The first line lies on top.
    [...this.chart.lines].reverse().forEach((line) => this.drawLine(line));
  }

  /** Sets the scales `across` and `up`, and returns the ticks of both. */
  setScales() {
    const { chart, margin } = this;
    const [left, right] = padded(this.stops, this.bare ? 0 : 0.012);
    this.across = makeScale(left, right, margin.left, this.width - margin.right);
    const [low, high] = this.limits();
    this.up = makeScale(low, high, this.height - margin.bottom, margin.top, chart.log);
    const whole = this.stops.every(Number.isInteger);
    return [
      linearTicks(left, right, Math.min(6, this.width / 80), whole),
      chart.log ? logTicks(low, high) : linearTicks(low, high, 5),
    ];
  }

  limits() {
    const { lines, log, unit, top } = this.chart;
    const series = lines.flatMap(({ y, trend, low, high }) => [y, trend, low, high]);
    const values = series.flatMap((values) => values || []).filter((value) => this.canShow(value));
    if (log) return padded(values.map(Math.log10), 0.05).map((value) => 10 ** value);
    const [low, high] = padded(values, 0.05);
    if (unit === "%") return [Math.max(low, -0.02), Math.min(high, 1.02)];
    return [lines.some((line) => line.high && !line.low) ? 0 : low, top ?? high];
  }

  shape(name, parent, attributes, text = "") {
    // The namespace is a web address, and the page names none.
    const shape = document.createElementNS(this.svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
    shape.append(text);
    parent.append(shape);
    return shape;
  }

  drawAxes(acrossTicks, upTicks) {
    const { svg, margin } = this;
    const bottom = this.height - margin.bottom;
    for (const y of [bottom, ...upTicks.map(this.up)]) {
      this.shape("path", svg, { class: "gridline", d: `M${margin.left} ${y}H${this.width - margin.right}` });
    }
    for (const tick of upTicks) {
      const place = { x: margin.left - 8, y: this.up(tick), dy: "0.35em", "text-anchor": "end" };
      this.shape("text", svg, place, short(tick, this.chart.unit, 5));
    }
    for (const tick of acrossTicks) {
      const place = { x: this.across(tick), y: bottom + 17, "text-anchor": "middle" };
      this.shape("text", svg, place, short(tick, "", 5));
    }
  }

  drawLine(line) {
    const group = this.shape("g", this.svg, { style: `--k: var(--${line.color})` });
    const path = (name, d) => this.shape("path", group, { class: name, d });
    if (line.high) path(line.low ? "band" : "layer", this.areaPath(line));
    if (line.high && !line.low) return;
    if (line.trend && !this.bare) path("faint", this.curvePath(line, line.y));
    path(`curve dash${line.dash % 4}`, this.curvePath(line, line.trend || line.y));
    if (this.bare || line.x.length > MOST_MARKERS) return;
    for (const [x, y] of this.pieces(line, line.y).flat()) {
      this.shape("circle", group, { class: "marker", r: 3.2, cx: this.across(x), cy: this.up(y) });
    }
  }

  pixels = ([x, y]) => `${this.across(x).toFixed(1)} ${this.up(y).toFixed(1)}`;

  curvePath(line, values) {
    // A stroke of no length makes a dot of a point between two gaps.
    return this.pieces(line, values).map((piece) => `M${piece.map(this.pixels).join("L")}h0`).join("");
  }

  areaPath(line) {
    const back = (piece) => piece.map(([x, , i]) => [x, line.low ? line.low[i] : 0]).reverse();
    const outline = (piece) => `M${[...piece, ...back(piece)].map(this.pixels).join("L")}Z`;
    return this.pieces(line, line.high).map(outline).join("");
  }

  // The pointer

  nearest(pixel) {
    const distance = (x) => Math.abs(this.across(x) - pixel);
    return this.stops.reduce((best, x) => (distance(x) < distance(best) ? x : best));
  }

  clear() {
    this.marks.forEach((mark) => mark.remove());
    this.marks = [];
  }

  mark(name, style) {
    const mark = create("div", this.box, style);
    mark.className = name;
    this.marks.push(mark);
    return mark;
  }

  /** Shows the values at x. */
  point(x) {
    this.clear();
    const { top, bottom } = this.margin;
    const left = this.across(x);
    const place = { left: `${left}px`, top: `${top}px` };
    this.mark("rule", { ...place, height: `${this.height - top - bottom}px` });
    const tip = this.mark("tip", place);
    create("em", tip, {}, `${this.chart.x} ${x}`);
    for (const line of this.chart.lines) {
      const y = line.y[line.x.indexOf(x)];
      if (y === undefined || y === null) continue;
      const color = { "--k": `var(--${line.color})` };
      const row = create("div", tip);
      create("b", row, {}, short(y, this.chart.unit, 4));
      create("span", row, color).className = "dot";
      row.append(line.name);
      const isLayer = line.high && !line.low;
      if (!isLayer && this.canShow(y)) this.mark("point", { ...place, top: `${this.up(y)}px`, ...color });
    }
    const flipped = left + tip.offsetWidth + 24 > this.width;
    tip.style.left = `${flipped ? left - tip.offsetWidth - 12 : left + 12}px`;
  }
}

document.querySelectorAll("[data-plot]").forEach((box) => new Plot(box));
