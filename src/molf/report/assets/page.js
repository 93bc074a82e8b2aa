"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const byId = new Map(data.figures.map((one) => [one.id, one]));

  // ---- helpers -------------------------------------------------------------------------------
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const color = (number) => css(`--c${number % 6}`);
  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;
  const shown = (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (typeof value !== "number") return String(value);
    if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e7)) return value.toExponential(2);
    return value.toLocaleString("en", { maximumSignificantDigits: 5 });
  };
  const bytes = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  const rgb = (text) => [1, 3, 5].map((start) => parseInt(text.slice(start, start + 2), 16));
  const NONE = 255;
  const FULL_SCALE = 200; // shares are stored as 0 to 200

  // ---- theme ---------------------------------------------------------------------------------
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const themeButton = document.getElementById("theme");
  const applyTheme = () => {
    const theme = chosen || (preferred.matches ? "dark" : "light");
    root.dataset.theme = theme;
    themeButton.textContent = theme === "dark" ? "Light" : "Dark";
    themeButton.setAttribute("aria-label", theme === "dark" ? "Change to light" : "Change to dark");
  };
  applyTheme();
  const drawings = []; // functions that draw one plot again
  const redraw = () => drawings.forEach((draw) => draw());
  themeButton.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    applyTheme();
    redraw();
  });
  preferred.addEventListener("change", () => { applyTheme(); redraw(); });

  // ---- lines ---------------------------------------------------------------------------------
  const WHOLE = Array.from({ length: 10 }, (_, power) => [1, 2, 5].map((one) => one * 10 ** power)).flat();
  const drawLines = (figure, plot) => {
    plot.replaceChildren();
    const fitting = (u, ticks) => 30 + 7 * Math.max(2, ...(ticks || []).map((one) => one.length));
    const axis = (label, size) => ({
      label, size, labelSize: 18, labelGap: 0, gap: 4,
      stroke: css("--muted"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 },
      font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif",
    });
    // A line needs two values: fewer are points.
    const few = (values) => figure.dotted || values.filter((one) => one !== null).length < 3;
    const whole = (...all) => (all.flat().every((one) => one === null || Number.isInteger(one)) ? { incrs: WHOLE } : {});
    const paths = figure.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined;
    const options = {
      width: Math.max(200, plot.clientWidth), height: 240,
      cursor: { drag: { x: true, y: false } },
      scales: {
        x: {
          time: false, ...(figure.x_range ? { range: figure.x_range } : {}),
          ...(figure.log_x ? { distr: 3 } : {}),
        },
        y: figure.y_range ? { range: figure.y_range } : {},
      },
      axes: [{
        ...axis(figure.x_label, 42),
        ...(figure.log_x
          ? { values: (u, ticks) => ticks.map((one) => one === null ? "" : shown(one)) }
          : whole(figure.x)),
      }, {
        ...axis(figure.y_label, fitting), ...whole(...figure.series.map((one) => one.values)), values: (u, ticks) => ticks.map(shown),
      }],
      series: [
        { label: figure.x_label, value: (u, value) => shown(value) },
        ...figure.series.map((one) => ({
          label: one.name, value: (u, value) => shown(value), spanGaps: Boolean(figure.dotted),
          ...(one.color > 5 ? { dash: [7, 4] } : {}), // colours repeat
          stroke: color(one.color) + (one.faint ? "66" : ""), width: one.faint ? 1 : 2,
          points: { show: few(one.values), size: 7 }, ...(paths ? { paths } : {}),
        })),
      ],
    };
    new uPlot(options, [figure.x, ...figure.series.map((one) => one.values)], plot);
    for (const canvas of plot.querySelectorAll("canvas")) {
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", figure.title);
      canvas.setAttribute("aria-describedby", `${figure.id}-text`);
    }
  };

  // ---- maps ----------------------------------------------------------------------------------
  const key = (name, fill) => {
    const swatch = make("i");
    swatch.style.background = fill;
    return make("span", { class: "key" }, swatch, name);
  };

  const heat = (figure, plot) => {
    const { rows, kinds, first, last } = figure;
    const planes = figure.planes.map(bytes);
    const columns = first.length;
    let order = rows.map((_, row) => row);
    let factor = 1;
    const canvas = make("canvas", {
      tabindex: "0", role: "img", "aria-label": `${figure.title}. Arrow keys read single cells.`,
      "aria-describedby": `${figure.id}-text`,
    });
    const reading = make("output", { "aria-live": "polite" });
    const keys = make("div", { class: "controls" });
    const select = make("select", { "aria-label": "Order of the layers" },
      make("option", { value: "model" }, "Model's order"), make("option", { value: "kind" }, "By kind"));
    const slider = figure.factors ? make("input", {
      type: "range", min: "0", max: String(figure.factors.length - 1), step: "1",
      value: String(figure.factors.indexOf(1)), "aria-label": "LoRA rate, times the recorded rate",
    }) : null;
    const result = make("output", { "aria-live": "polite" });

    const marginAt = (row, column) => {
      const stored = planes[0][row * columns + column];
      if (stored === NONE) return null;
      const margin = stored / 100 - 1;
      if (factor === 1) return margin;
      const ratio = (1 + margin) / Math.max(1 - margin, 1e-9) / factor;
      return (ratio - 1) / (ratio + 1);
    };
    const mix = (a, b, share) => a.map((value, i) => value + (b[i] - value) * share);
    const cellColor = (row, column, palette) => {
      if (figure.is_margin) {
        const margin = marginAt(row, column);
        if (margin === null) return palette.empty;
        return mix(palette.middle, margin > 0 ? palette.parts[0] : palette.parts[1], Math.min(1, Math.sqrt(Math.abs(margin) * 1.5)));
      }
      const shares = planes.map((plane) => plane[row * columns + column]);
      if (shares[0] === NONE) return palette.empty;
      const total = shares.reduce((sum, one) => sum + one, 0) || 1;
      return [0, 1, 2].map((i) => shares.reduce((sum, one, part) => sum + one * palette.parts[part][i], 0) / total);
    };

    let area = { left: 0, top: 4, width: 1, height: 1, row: 1 };
    let at = null;
    const short = (name) => name.replace(/^(model|transformer)\./, "").replace(/^(layers|h|blocks)\./, "");
    const draw = () => {
      const palette = {
        empty: rgb(css("--empty")), middle: rgb(css("--bg")),
        parts: figure.names.map((_, number) => rgb(color(number))),
      };
      const width = Math.max(220, plot.clientWidth);
      const row = Math.max(2, Math.min(16, Math.floor(420 / rows.length)));
      const ratio = devicePixelRatio || 1;
      const context = canvas.getContext("2d");
      const font = "11px system-ui, sans-serif";
      context.font = font;
      const labels = order.map((one) => short(rows[one]));
      const byKind = select.value === "kind";
      const widest = Math.max(...(byKind ? kinds : labels).map((one) => context.measureText(one).width));
      area = { left: Math.min(Math.ceil(widest) + 8, Math.floor(width * 0.4)), top: 4, row, height: row * rows.length };
      area.width = width - area.left - 8;
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round((area.height + 44) * ratio);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${area.height + 44}px`;
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.font = font;
      const picture = new ImageData(columns, rows.length);
      order.forEach((one, y) => {
        for (let x = 0; x < columns; x += 1) {
          const [r, g, b] = cellColor(one, x, palette);
          picture.data.set([r, g, b, 255], 4 * (y * columns + x));
        }
      });
      const small = make("canvas", { width: columns, height: rows.length });
      small.getContext("2d").putImageData(picture, 0, 0);
      context.imageSmoothingEnabled = false;
      context.drawImage(small, area.left, area.top, area.width, area.height);
      context.fillStyle = css("--muted");
      context.textBaseline = "middle";
      context.textAlign = "right";
      let free = -Infinity;
      order.forEach((one, y) => {
        const middle = area.top + (y + 0.5) * row;
        const isNew = !byKind || y === 0 || kinds[order[y - 1]] !== kinds[one];
        if (!isNew || middle < free) return;
        let label = byKind ? kinds[one] : labels[y];
        while (label.length > 4 && context.measureText(label).width > area.left - 6) label = `…${label.slice(2)}`;
        context.fillText(label, area.left - 5, byKind ? Math.max(middle, area.top + 6) : middle);
        free = middle + 13;
      });
      context.textBaseline = "top";
      const ticks = Math.max(1, Math.min(columns, Math.floor(area.width / 70)));
      for (let tick = 0; tick <= ticks; tick += 1) {
        const column = Math.min(columns - 1, Math.round(tick * (columns - 1) / ticks));
        const x = area.left + (column + 0.5) * area.width / columns;
        context.textAlign = tick === 0 ? "left" : tick === ticks ? "right" : "center";
        context.fillText(shown(first[column]), Math.max(area.left, Math.min(x, area.left + area.width)), area.top + area.height + 5);
        if (columns === 1) break;
      }
      context.textAlign = "center";
      context.fillText("step", area.left + area.width / 2, area.top + area.height + 22);
      if (at) {
        context.strokeStyle = css("--text");
        context.strokeRect(area.left + at.column * area.width / columns, area.top + at.y * row, Math.max(2, area.width / columns), row);
      }
      keys.replaceChildren(
        ...figure.names.map((name, number) => key(figure.is_margin ? `${name} leads` : name, color(number))),
        key("no decision", css("--empty")), ...(rows.length > 1 ? [select] : []));
    };
    const read = () => {
      if (!at) return;
      const row = order[at.y];
      const steps = first[at.column] === last[at.column] ? `step ${first[at.column]}` : `steps ${first[at.column]} to ${last[at.column]}`;
      let text = "no decision";
      if (figure.is_margin) {
        const margin = marginAt(row, at.column);
        if (margin !== null) text = `margin ${margin > 0 ? "+" : ""}${margin.toFixed(2)}`;
      } else if (planes[0][row * columns + at.column] !== NONE) {
        text = figure.names.map((name, part) => `${name} ${percent(planes[part][row * columns + at.column] / FULL_SCALE)}`).join(", ");
      }
      reading.textContent = `${rows[row]}, ${steps}: ${text}`;
    };
    const move = (column, y) => {
      at = {
        column: Math.max(0, Math.min(columns - 1, column)), y: Math.max(0, Math.min(rows.length - 1, y)),
      };
      draw();
      read();
    };
    canvas.addEventListener("mousemove", (event) => {
      const x = event.offsetX - area.left;
      const y = event.offsetY - area.top;
      if (x < 0 || y < 0 || x >= area.width || y >= area.height) return;
      at = { column: Math.floor(x * columns / area.width), y: Math.floor(y / area.row) };
      read();
    });
    canvas.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!steps) return;
      event.preventDefault();
      const now = at || { column: 0, y: 0 };
      move(now.column + steps[0], now.y + steps[1]);
    });
    canvas.addEventListener("blur", () => { at = null; draw(); });
    select.addEventListener("change", () => {
      order = rows.map((_, row) => row);
      if (select.value === "kind") {
        const rank = new Map([...new Set(kinds)].map((kind, number) => [kind, number]));
        order.sort((a, b) => rank.get(kinds[a]) - rank.get(kinds[b]) || a - b);
      }
      draw();
    });
    const controls = [];
    if (slider) {
      const table = figure.table.rows;
      const layers = figure.layers;
      const update = () => {
        const number = Number(slider.value);
        factor = figure.factors[number];
        const [, ratio, share, leading] = table[number];
        const rate = factor === 1 ? "At the recorded rates" : `At ${shown(factor)} times the recorded LoRA rate`;
        result.textContent = `${rate} (LoRA rate ${shown(ratio)} times full): full wins ${percent(share)} of the recorded decisions, and most of them in ${leading} of ${layers} layers. ${factor === 1 ? "" : "No rerun."}`;
        slider.setAttribute("aria-valuetext", `${shown(factor)} times`);
        draw();
        read();
      };
      slider.addEventListener("input", update);
      controls.push(make("div", { class: "controls" }, "LoRA rate", slider), result);
      plot.replaceChildren(keys, canvas, reading, ...controls);
      update();
    } else {
      plot.replaceChildren(keys, canvas, reading);
      draw();
    }
    return draw;
  };

  // ---- bars ----------------------------------------------------------------------------------
  const drawBars = (figure, plot) => {
    const keys = make("div", { class: "controls" }, ...figure.parts.map((name, number) => key(name, color(number))));
    const bars = make("div", { class: "bars", "aria-hidden": "true" });
    figure.groups.forEach((name, group) => {
      const total = Math.max(1, figure.values[group].reduce((sum, one) => sum + one, 0));
      const bar = make("div", { class: "bar" });
      figure.values[group].forEach((share, number) => {
        const part = make("i");
        part.style.width = `${100 * share / total}%`;
        part.style.background = color(number);
        part.title = `${figure.parts[number]} ${percent(share)}`;
        bar.append(part);
      });
      bars.append(make("span", {}, name), bar);
    });
    plot.replaceChildren(keys, bars);
  };

  // ---- points --------------------------------------------------------------------------------
  const svg = (tag, attributes = {}, ...children) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const SHAPES = [ // around 0, 0
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z", "M-5,-5H5V5H-5Z", "M0,-6.5L6.5,0L0,6.5L-6.5,0Z",
    "M0,-6L6,5H-6Z", "M0,6L6,-5H-6Z", "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
  ];
  const shapeOf = (number) => SHAPES[(number + Math.floor(number / 6)) % SHAPES.length];
  const ticksOf = (low, high, most) => {
    const rough = (high - low) / Math.max(1, most);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
    const ticks = [];
    for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) {
      ticks.push(Number(tick.toPrecision(12)));
    }
    return ticks;
  };
  const drawPoints = (figure, plot) => {
    const width = Math.max(240, plot.clientWidth);
    const height = 300;
    const spread = (axis) => {
      const all = figure.points.flatMap((one) => one[axis].filter((value) => value !== null));
      const [low, high] = [Math.min(...all), Math.max(...all)];
      const edge = 0.06 * ((high - low) || Math.abs(high) || 1);
      return [low - edge, high + edge];
    };
    const [x0, x1] = spread("x");
    const [y0, y1] = spread("y");
    const yTicks = ticksOf(y0, y1, 5);
    const left = 34 + 7 * Math.max(...yTicks.map((one) => shown(one).length));
    const area = { left, right: width - 12, top: 8, bottom: height - 44 };
    const placeX = (value) => area.left + (value - x0) / (x1 - x0) * (area.right - area.left);
    const placeY = (value) => area.bottom - (value - y0) / (y1 - y0) * (area.bottom - area.top);
    const picture = svg("svg", {
      viewBox: `0 0 ${width} ${height}`, width, height, role: "img", class: "points",
      "aria-label": figure.title, "aria-describedby": `${figure.id}-text`,
    });
    const line = (x, y, toX, toY, attributes) => picture.append(svg("line", { x1: x, y1: y, x2: toX, y2: toY, ...attributes }));
    const write = (text, attributes) => picture.append(svg("text", attributes, text));
    for (const tick of ticksOf(x0, x1, Math.max(2, (area.right - area.left) / 90))) {
      line(placeX(tick), area.top, placeX(tick), area.bottom, { class: "rule" });
      write(shown(tick), { x: placeX(tick), y: area.bottom + 16, "text-anchor": "middle" });
    }
    for (const tick of yTicks) {
      line(area.left, placeY(tick), area.right, placeY(tick), { class: "rule" });
      write(shown(tick), { x: area.left - 6, y: placeY(tick) + 4, "text-anchor": "end" });
    }
    write(figure.x_label, { x: (area.left + area.right) / 2, y: height - 8, "text-anchor": "middle" });
    const middle = (area.top + area.bottom) / 2;
    write(figure.y_label, { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` });
    const front = figure.front.map((number) => figure.points[number]);
    picture.append(svg("polyline", { class: "front", points: front.map((one) => `${placeX(one.x[0])},${placeY(one.y[0])}`).join(" ") }));
    figure.points.forEach((one, number) => {
      const stroke = color(number);
      const [x, y] = [placeX(one.x[0]), placeY(one.y[0])];
      if (one.x[1] !== null && one.x[2] !== null) line(placeX(one.x[1]), y, placeX(one.x[2]), y, { stroke, "stroke-width": 1.5 });
      if (one.y[1] !== null && one.y[2] !== null) line(x, placeY(one.y[1]), x, placeY(one.y[2]), { stroke, "stroke-width": 1.5 });
      picture.append(svg("path", { d: shapeOf(number), transform: `translate(${x} ${y})`, fill: stroke, class: "mark" },
        svg("title", {}, `${one.name}: ${shown(one.x[0])}, ${shown(one.y[0])}`)));
    });
    const keys = make("div", { class: "controls" }, ...figure.points.map((one, number) => make("span", { class: "key" },
      svg("svg", { viewBox: "-7 -7 14 14", width: 14, height: 14, "aria-hidden": "true" }, svg("path", { d: shapeOf(number), fill: color(number) })), one.name)));
    plot.replaceChildren(keys, picture);
  };

  // ---- tables --------------------------------------------------------------------------------
  const MOST_ROWS = 250;
  const csv = (table) => [table.columns, ...table.rows].map((row) => row.map((cell) => {
    const text = cell === null ? "" : String(cell);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }).join(",")).join("\n") + "\n";
  const tableOf = (figure) => figure.table || {
    columns: [figure.x_label, ...figure.series.map((one) => one.name)],
    rows: figure.x.map((x, row) => [x, ...figure.series.map((one) => one.values[row])]),
  };
  const fillTable = (details) => {
    if (details.querySelector("table")) return;
    const figure = byId.get(details.dataset.figure);
    const table = tableOf(figure);
    const every = Math.max(1, Math.ceil(table.rows.length / MOST_ROWS));
    const rows = table.rows.filter((_, row) => row % every === 0 || row === table.rows.length - 1);
    const body = make("tbody");
    for (const row of rows) {
      const [name, ...cells] = row;
      body.append(make("tr", {}, make("th", { scope: "row" }, shown(name)), ...cells.map((one) => make("td", {}, shown(one)))));
    }
    const head = make("thead", {}, make("tr", {}, ...table.columns.map((name) => make("th", { scope: "col" }, name))));
    const caption = every > 1 ? [make("p", { class: "text" }, `Every ${every}th of ${table.rows.length} rows.`)] : [];
    const save = make("button", { type: "button" }, "Save as CSV");
    save.addEventListener("click", () => {
      const link = make("a", { download: `${figure.file}.csv`, href: URL.createObjectURL(new Blob([csv(table)], { type: "text/csv" })) });
      link.click();
      URL.revokeObjectURL(link.href);
    });
    details.append(...caption, make("div", {
      class: "scroll tall", tabindex: "0", role: "region", "aria-label": `Values of ${figure.title}`,
    }, make("table", {}, head, body)), save);
  };
  for (const details of document.querySelectorAll("details.values")) {
    details.addEventListener("toggle", () => { if (details.open) fillTable(details); });
  }

  // ---- samples -------------------------------------------------------------------------------
  const PAGE = 10;
  for (const section of document.querySelectorAll(".samples")) {
    const all = data.samples[Number(section.dataset.run)];
    const list = section.querySelector(".list");
    const output = section.querySelector("output");
    const more = section.querySelector(".more");
    const search = section.querySelector("input");
    let show = "all";
    let count = PAGE;
    const update = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const found = all.filter((one) => {
        if (show === "right" && one.right !== true) return false;
        if (show === "wrong" && one.right !== false) return false;
        const whole = (one.segments || []).map((pair) => pair[0]).join("");
        const text = [whole, ...one.texts.map((pair) => pair[1])].join("\n").toLowerCase();
        return words.every((word) => text.includes(word) || `#${one.index}` === word);
      });
      output.textContent = `${found.length} of ${all.length} ${section.dataset.what}`;
      list.replaceChildren(...found.slice(0, count).map((one) => {
        const state = one.state !== undefined ? one.state : one.left_out ? `left out: ${one.left_out}` : one.right === true ? "right" : one.right === false ? "wrong" : "";
        const entries = (pairs) => make("dl", {}, ...pairs.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
        const article = make("article", { class: "sample" },
          make("h3", {}, `${one.task} #${one.index} `.trim() + " ", make("span", { class: one.right === true ? "right" : one.right === false || one.left_out ? "wrong" : "muted" }, state)),
          ...(one.about ? [make("p", { class: "text" }, one.about)] : []),
          ...(one.segments ? [make("p", { class: "segments" }, ...one.segments.map(([text, hasLoss]) => hasLoss ? make("mark", {}, text) : text))] : []),
          entries(one.texts.slice(0, one.main)));
        if (one.texts.length > one.main) {
          article.append(make("details", {}, make("summary", {}, "Further values"), entries(one.texts.slice(one.main))));
        }
        return article;
      }));
      more.hidden = found.length <= count;
    };
    for (const button of section.querySelectorAll("button[data-show]")) {
      button.addEventListener("click", () => {
        show = button.dataset.show;
        count = PAGE;
        for (const other of section.querySelectorAll("button[data-show]")) {
          other.setAttribute("aria-pressed", String(other === button));
        }
        update();
      });
    }
    search.addEventListener("input", () => { count = PAGE; update(); });
    more.addEventListener("click", () => { count += PAGE; update(); });
    update();
  }

  // ---- start ---------------------------------------------------------------------------------
  for (const plot of document.querySelectorAll(".plot")) {
    const figure = byId.get(plot.dataset.figure);
    let draw;
    if (figure.kind === "heat") draw = heat(figure, plot);
    else {
      draw = () => ({ lines: drawLines, bars: drawBars, points: drawPoints })[figure.kind](figure, plot);
      draw();
    }
    drawings.push(draw);
    plot.dataset.drawn = "true";
  }
  let width = innerWidth;
  let waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 120);
  });
  root.dataset.ready = "true";
})();
