"use strict";
// The page of a run. What it shows is computed already (the JSON in #data); this draws it.
// Every text goes in as text, never as markup.
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";

  // h("p.small", {title: "x"}, "text", child): an element
  function h(what, attributes, ...children) {
    const [tag, ...classes] = what.split(".");
    return fill(document.createElement(tag), classes, attributes, children);
  }

  function s(tag, attributes, ...children) {
    return fill(document.createElementNS(SVG, tag), [], attributes, children);
  }

  function fill(made, classes, attributes, children) {
    made.classList.add(...classes);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null && child !== ""));
    return made;
  }

  const colour = (name) =>
    ({ strong: "var(--accent)", soft: "var(--line)" })[name] || `var(--role-${name}, var(--role-other))`;

  // --- the numbers, the picture ----------------------------------------------------------------

  function numbers(view) {
    const list = h("dl.numbers", { "data-part": "numbers" });
    for (const each of view.numbers) {
      const note = each.note ? h("small", {}, each.note) : null;
      list.append(h("div", {}, h("dt", {}, each.label, note), h("dd", {}, each.value)));
    }
    return list;
  }

  function picture(found) {
    const part = h("section.picture", {}, h("h2", {}, found.title));
    if (found.note) part.append(h("p.small", {}, found.note));
    const words = found.bars.map((bar) => `${bar.label}: ${bar.text}`).join("; ");
    const svg = s("svg", { role: "img", "aria-label": `${found.title}. ${words}.` });
    part.append(svg);
    if (found.legend) part.append(legend(found.bars));
    const draw = () => drawBars(svg, found);
    new ResizeObserver(draw).observe(part);
    return part;
  }

  function legend(bars) {
    const list = h("ul.legend");
    const last = bars[bars.length - 1].segments;
    for (const first of bars[0].segments) {
      const after = last.find((each) => each.label === first.label);
      const swatch = h("i.swatch", { style: `--role: ${colour(first.colour)}` });
      const sizes = h("span", {}, ` ${first.text} → ${after ? after.text : "0"}`);
      list.append(h("li", {}, swatch, first.label, sizes));
    }
    const names = new Set(bars[0].segments.map((each) => each.label));
    for (const each of last.filter((one) => !names.has(one.label))) {
      const swatch = h("i.swatch", { style: `--role: ${colour(each.colour)}` });
      list.append(h("li", {}, swatch, each.label, h("span", {}, ` ${each.text}`)));
    }
    return list;
  }

  function drawBars(svg, found) {
    const width = svg.clientWidth || 300;
    const thick = found.bars.length > 3 ? 14 : 30;
    let y = 8;
    svg.replaceChildren();
    for (const bar of found.bars) {
      svg.append(s("text", { x: 0, y: y + 13 }, bar.label));
      svg.append(s("text", { x: width, y: y + 13, "text-anchor": "end", class: "figure" }, bar.text));
      y += 20;
      if (!found.legend) {
        svg.append(s("rect", { x: 0, y, width, height: thick, fill: "var(--soft)" }));
      }
      drawSegments(svg, bar.segments, y, thick, width / found.scale);
      y += thick + 14;
    }
    if (found.zoom) {
      const last = found.bars[found.bars.length - 1];
      const size = last.segments.reduce((sum, each) => sum + each.size, 0);
      const small = (size * width) / found.scale;
      const points = `0,${y - 14} ${small},${y - 14} ${width},${y + 14} 0,${y + 14}`;
      svg.append(s("polygon", { points, fill: "var(--text)", opacity: 0.08 }));
      drawSegments(svg, last.segments, y + 14, thick, width / size);
      y += thick + 16;
    }
    svg.setAttribute("height", y);
    svg.setAttribute("viewBox", `0 0 ${width} ${y}`);
  }

  function drawSegments(svg, segments, y, height, unit) {
    let x = 0;
    const gap = segments.length > 1 ? 1 : 0;
    for (const each of segments) {
      const width = Math.max(0.5, each.size * unit - (each.size * unit > 3 ? gap : 0));
      const inset = each.hollow ? 0.75 : 0;
      const box = s("rect", {
        x: x + inset, y: y + inset, width: Math.max(0.5, width - 2 * inset), height: height - 2 * inset,
        fill: each.hollow ? "none" : colour(each.colour),
        stroke: each.hollow ? "var(--muted)" : null, "stroke-dasharray": each.hollow ? "3 2" : null,
      }, s("title", {}, each.text ? `${each.label}: ${each.text}` : each.label));
      svg.append(box);
      x += each.size * unit;
    }
  }

  // --- the map ----------------------------------------------------------------------------------

  function map(found, number) {
    const part = h("section", { "data-part": "map" }, h("h2", {}, found.title));
    const note = h("p.small", { "aria-live": "polite" });
    const detail = h("aside.detail", { "aria-live": "polite", "aria-label": "What lies behind a place" });
    detail.append(h("p.small", { style: "margin: 0" }, found.hint));
    const cells = [];
    const choice = measures(found, number, (at) => {
      note.textContent = found.measures[at].note;
      for (const [button, cell] of cells) paint(button, cell, at);
    });
    const open = (place, column, button) => {
      for (const [each] of cells) each.setAttribute("aria-pressed", String(each === button));
      show(detail, found, place, column, button);
    };
    const table = mapTable(found, cells, open);
    if (found.measures.length > 1) part.append(choice);
    part.append(note, h("div.explore", {}, table, detail));
    note.textContent = found.measures[0].note;
    for (const [button, cell] of cells) paint(button, cell, 0);
    return part;
  }

  function measures(found, number, choose) {
    const set = h("fieldset.measures", { "aria-label": "What the map shows" });
    found.measures.forEach((measure, at) => {
      const input = h("input", { type: "radio", name: `measure-${number}`, value: at });
      input.checked = at === 0;
      input.addEventListener("change", () => choose(at));
      set.append(h("label", {}, input, measure.label));
    });
    return set;
  }

  function mapTable(found, cells, open) {
    const head = h("tr", {}, h("th", { scope: "col" }, "block"));
    found.columns.forEach((name, at) => {
      const role = found.colours[at] ? `--role: ${colour(found.colours[at])}` : null;
      head.append(h("th", { scope: "col", title: name, style: role }, name));
    });
    const body = h("tbody");
    for (const place of found.places) {
      const row = h("tr", {}, h("th", { scope: "row", title: place.title }, place.label));
      place.cells.forEach((cell, column) => {
        const held = h("td");
        if (cell) {
          const button = h("button", { type: "button", "aria-pressed": "false" });
          button.dataset.about = `${place.title}, ${found.columns[column]}`;
          button.addEventListener("click", () => open(place, column, button));
          cells.push([button, cell]);
          held.append(button);
        }
        row.append(held);
      });
      body.append(row);
    }
    const table = h("table.map", {}, h("thead", {}, head), body);
    table.addEventListener("keydown", (event) => walk(event, table));
    return table;
  }

  function paint(button, cell, at) {
    const shade = cell.shades[at];
    button.textContent = cell.texts[at];
    button.setAttribute("aria-label", `${button.dataset.about}: ${cell.texts[at]}`);
    button.classList.toggle("shaded", shade !== null && shade !== undefined);
    if (shade !== null && shade !== undefined) button.style.setProperty("--shade", shade);
  }

  // Arrow keys go from place to place.
  function walk(event, table) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key];
    const here = event.target.closest("td");
    if (!step || !here) return;
    event.preventDefault();
    const row = table.rows[here.parentElement.rowIndex + step[0]];
    const next = row && row.cells[here.cellIndex + step[1]];
    const button = next && next.querySelector("button");
    if (button) button.focus();
  }

  function show(detail, found, place, column, opener) {
    const role = column ? found.columns[column] : "";
    const lines = place.lines.filter((line) => !column || !line.column || line.column === column);
    const close = h("button.close", { type: "button" }, "Close");
    close.addEventListener("click", () => {
      detail.classList.remove("open");
      opener.focus();
    });
    const title = h("h3", {}, role ? `${place.title}, ${role}` : place.title);
    detail.replaceChildren(h("header", {}, title, close), h("p.small", {}, column ? "" : place.summary));
    if (lines.length) detail.append(lineTable(found, lines));
    detail.classList.add("open");
    detail.scrollTop = 0;
  }

  function lineTable(found, lines) {
    const [first, ...rest] = found.line_columns;
    const stem = commonStem(lines.map((line) => line.cells[0]));
    const head = h("tr", {}, h("th", { scope: "col" }, first));
    for (const name of rest) head.append(h("th.n", { scope: "col" }, name));
    const body = h("tbody");
    for (const line of lines) {
      const [name, ...values] = line.cells;
      const why = line.note ? h("span.why", {}, line.note) : null;
      const row = h("tr", {}, h("th", { scope: "row", title: name }, name.slice(stem.length), why));
      values.forEach((value, at) => row.append(h("td.n", { "data-label": rest[at] }, value)));
      body.append(row);
    }
    const caption = stem ? h("caption.small", {}, stem) : null;
    return h("table.plain", {}, caption, h("thead", {}, head), body);
  }

  // What all names begin with, up to a dot: it is said once.
  function commonStem(names) {
    if (names.length < 2) return "";
    let stem = names[0].slice(0, names[0].lastIndexOf(".") + 1);
    while (stem && !names.every((name) => name.startsWith(stem))) {
      stem = stem.slice(0, stem.lastIndexOf(".", stem.length - 2) + 1);
    }
    return stem;
  }

  // --- answers, tables, how it was made ---------------------------------------------------------

  function answers(samples) {
    const part = h("section", { "data-part": "answers" }, h("h2", {}, "Answers side by side"));
    part.append(h("p.small", {}, "The first rows of each task, not chosen; every model decodes greedily."));
    const list = h("div.samples");
    for (const sample of samples) {
      const prompt = h("p.prompt", {}, h("b", {}, sample.task), sample.prompt);
      const written = h("div.written");
      for (const each of sample.written) {
        const wrote = h("div.wrote", {}, h("b", {}, each.label), h("pre", {}, each.text || "(nothing)"));
        wrote.append(h("i", {}, each.right ? "✓ right" : "✗ wrong"));
        if (each.right) wrote.classList.add("right");
        written.append(wrote);
      }
      const wanted = h("div.wrote", {}, h("b", {}, "wanted"), h("pre", {}, sample.wanted));
      written.append(wanted);
      list.append(h("article.sample", {}, prompt, written));
    }
    part.append(list);
    return part;
  }

  function tables(found) {
    const part = h("details", { "data-part": "tables" }, h("summary", {}, "All figures"));
    for (const table of found) {
      const head = h("tr");
      const cellClass = (at) => (at < table.left ? "" : ".n");
      table.columns.forEach((name, at) => head.append(h(`th${cellClass(at)}`, { scope: "col" }, name)));
      const body = h("tbody");
      for (const row of table.rows) {
        const line = h("tr");
        row.forEach((cell, at) => {
          const made = h((at ? "td" : "th") + cellClass(at), at ? {} : { scope: "row" }, cell.text);
          if (cell.strong) made.classList.add("strong");
          line.append(made);
        });
        body.append(line);
      }
      const shown = h("table.plain", {});
      if (table.columns.some((name) => name)) shown.append(h("thead", {}, head));
      shown.append(body);
      const box = h("div.scroll", { tabindex: 0, role: "region", "aria-label": table.title }, shown);
      part.append(h("h3", {}, table.title), box);
      for (const note of table.notes) part.append(h("p.small", {}, note));
    }
    return part;
  }

  function made(run) {
    const part = h("section", { "data-part": "made" }, h("h2", {}, "To do it again"));
    if (run.command) {
      const copy = h("button.copy", { type: "button" }, "Copy");
      copy.addEventListener("click", () => {
        const done = () => { copy.textContent = "Copied"; };
        if (navigator.clipboard) navigator.clipboard.writeText(run.command).then(done, () => {});
      });
      part.append(h("div.command", {}, h("pre", {}, ...words(run.command)), copy));
    } else {
      part.append(h("p.small", {}, "The record holds no command line; these were the settings."));
    }
    part.append(facts(run.command ? run.machine : [...run.settings, ...run.machine]));
    return part;
  }

  // A line ends between two words of the command, not at the hyphens of an option.
  function words(command) {
    return command.split(" ").flatMap((word) => [h("span", {}, word), " "]).slice(0, -1);
  }

  function facts(pairs) {
    const list = h("dl.facts");
    for (const [name, value] of pairs) list.append(h("div", {}, h("dt", {}, name), h("dd", {}, value)));
    return list;
  }

  // --- the page ---------------------------------------------------------------------------------

  function draw(run, number) {
    const view = run.view;
    const heading = number ? h("h2.name", {}, view.title) : h("h1", {}, view.title);
    const part = h("article.run", {}, h("p.kind", {}, view.kind), heading, h("p.sentence", {}, view.sentence));
    if (view.numbers.length) part.append(numbers(view));
    if (view.picture) part.append(picture(view.picture));
    if (view.map) part.append(map(view.map, number));
    if (view.samples.length) part.append(answers(view.samples));
    part.append(made(run), tables(run.tables));
    if (!view.numbers.length) part.querySelector("details").open = true;
    return part;
  }

  function theme() {
    const root = document.documentElement;
    const button = document.getElementById("theme");
    const system = matchMedia("(prefers-color-scheme: dark)");
    const dark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
    const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      name();
    });
    system.addEventListener("change", name);
    name();
  }

  theme();
  document.getElementById("runs").append(...runs.map(draw));
  document.addEventListener("keydown", (event) => {
    const close = event.key === "Escape" && document.querySelector(".detail.open .close");
    if (close) close.click();
  });
})();
