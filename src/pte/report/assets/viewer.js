// The page's own behaviour: theme, place in the table of contents, and the rollout viewer. No library, no request.
"use strict";
(() => {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (theme) => { root.dataset.theme = theme; };
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () =>
    setTheme(root.dataset.theme === "dark" ? "light" : "dark"));

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const watcher = new IntersectionObserver((entries) => entries.forEach((entry) => {
    const link = links.get(entry.target.id);
    if (link) link.classList.toggle("here", entry.isIntersecting);
  }), { rootMargin: "-10% 0px -70% 0px" });
  document.querySelectorAll("section[id]").forEach((section) => watcher.observe(section));

  const viewer = document.querySelector(".viewer");
  if (!viewer) return;
  const groups = JSON.parse(document.getElementById("rollouts").textContent);
  const find = (role) => viewer.querySelector(`[data-role="${role}"]`);
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const SVG = "http://www.w3.org/2000/svg";
  const draw = (parent, tag, attributes, text) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  };
  const bytes = (value) => {
    for (const [size, unit] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
      if (value >= size) return `${(value / size).toPrecision(3)} ${unit}`;
    return `${value} B`;
  };
  // A number that is not known is null.
  const short = (value) => (value === null ? "-" : value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 0.001
    ? value.toExponential(1) : String(Number(value.toPrecision(3))));
  const visible = (text) => (text.trim() === "" ? JSON.stringify(text) : text.trim());

  let rollout, leftAt, tokens, cuts, cursors, chartWidth, step;

  // --- which tokens are where ---------------------------------------------------------------------------------
  // At step t the tokens 0 .. t-1 are written and token t is drawn next. A completion's last token never enters.
  const entered = (t) => Math.min(t, rollout.completion_tokens.length - 1);
  const isEvicted = (index, t) => leftAt[index] !== undefined && leftAt[index] < entered(t);
  const evictionsBefore = (t) => rollout.evictions.filter((one) => one.before_token < entered(t)).length;
  const windowAt = (t) => {
    const kept = [];
    for (let index = 0; index < entered(t); index += 1) if (!isEvicted(index, t)) kept.push(index);
    return kept;
  };

  // --- tooltips -----------------------------------------------------------------------------------------------
  const tooltip = document.querySelector(".tooltip");
  const show = (event, text) => {
    tooltip.textContent = text;
    tooltip.hidden = false;
    const box = tooltip.getBoundingClientRect();
    tooltip.style.left = `${Math.max(8, Math.min(event.clientX + 14, window.innerWidth - box.width - 8))}px`;
    const below = event.clientY + 18;
    tooltip.style.top = `${below + box.height > window.innerHeight ? event.clientY - box.height - 12 : below}px`;
  };
  const describe = (index) => {
    const logprob = rollout.logprobs[index];
    const probability = Math.exp(logprob);
    const likely = probability > 0.9995 && probability < 1 ? "> 0.999" : probability.toPrecision(3);
    const drawn = logprob === null ? "-" : `${logprob.toFixed(4)} nats (p = ${likely})`;
    const left = leftAt[index] === undefined ? "never evicted" : `evicted before token ${leftAt[index]} entered`;
    return `token ${index}: ${visible(rollout.completion_tokens[index])}\nlog-prob ${drawn}\n${left}`;
  };
  viewer.addEventListener("mousemove", (event) => {
    const target = event.target.closest("[data-token], [data-tip]");
    if (!target) { tooltip.hidden = true; return; }
    show(event, target.dataset.tip || describe(Number(target.dataset.token)));
  });
  viewer.addEventListener("mouseleave", () => { tooltip.hidden = true; });

  // --- the text -----------------------------------------------------------------------------------------------
  const tokenSpan = (text, className) => make("span", `token ${className}`, text);
  const heat = (logprob) => `rgba(var(--heat), ${Math.min(0.85, -logprob / 3.5).toFixed(3)})`;
  const buildStream = () => {
    const stream = find("stream");
    stream.replaceChildren();
    rollout.prompt_tokens.forEach((text, index) => {
      const span = tokenSpan(text, "prompt");
      span.dataset.tip = `prompt token ${index}: ${visible(text)}\nnever evicted`;
      stream.append(span);
    });
    stream.append(make("span", "cut prompt-end", "prompt ends"));
    const at = new Map(rollout.evictions.map((one, number) => [one.before_token, number]));
    tokens = []; cuts = [];
    rollout.completion_tokens.forEach((text, index) => {
      if (at.has(index)) {
        const eviction = rollout.evictions[at.get(index)];
        const cut = make("span", "cut", `✂ ${at.get(index) + 1}`);
        cut.dataset.step = index + 1;
        cut.dataset.tip = `eviction ${at.get(index) + 1}, before token ${index} enters\n${eviction.evicted_tokens.length} `
          + `tokens leave: ${eviction.evicted_tokens.map((left) => visible(rollout.completion_tokens[left])).slice(0, 24).join(" ")}`;
        cuts.push([cut, index]);
        stream.append(cut);
      }
      const span = tokenSpan(text, "");
      span.dataset.token = index;
      span.dataset.step = index;
      span.style.backgroundColor = heat(rollout.logprobs[index]);
      tokens.push(span);
      stream.append(span);
    });
  };

  // --- charts over tokens: surprise, |S|, change of S ---------------------------------------------------------
  const LEFT = 56, RIGHT = 12, TOP = 8, BOTTOM = 20, HEIGHT = 130;
  const layerColour = (layer, layers) => {
    const share = layers > 1 ? layer / (layers - 1) : 0;
    const ends = [[86, 180, 233], [0, 114, 178], [204, 121, 167], [213, 94, 0]];
    const place = share * (ends.length - 1), low = Math.min(ends.length - 2, Math.floor(place)), rest = place - low;
    return `rgb(${ends[low].map((value, index) => Math.round(value + rest * (ends[low + 1][index] - value))).join(",")})`;
  };
  const chart = (title, top, unit) => {
    const holder = make("div");
    const head = make("div", "label");
    head.append(make("b", "", title));
    if (unit) head.append(make("span", "", unit));
    holder.append(head);
    const svg = draw(holder, "svg", { viewBox: `0 0 ${chartWidth} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title });
    find("charts").append(holder);
    const count = Math.max(1, rollout.completion_tokens.length);
    const x = (token) => LEFT + (chartWidth - LEFT - RIGHT) * token / count;
    const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / (top || 1);
    for (const value of [0, (top || 1) / 2, top || 1]) {
      draw(svg, "line", { class: "axis", x1: LEFT, x2: chartWidth - RIGHT, y1: y(value), y2: y(value) });
      draw(svg, "text", { x: LEFT - 7, y: y(value) + 4, "text-anchor": "end" }, short(value));
    }
    const gap = Math.max(1, Math.ceil(count / 10 / 5) * 5);
    for (let token = 0; token <= count; token += gap)
      draw(svg, "text", { x: x(token), y: HEIGHT - 5, "text-anchor": "middle" }, token);
    rollout.evictions.forEach((one) => draw(svg, "line", { class: "evict", x1: x(one.before_token), x2: x(one.before_token), y1: TOP, y2: HEIGHT - BOTTOM }));
    cursors.push([draw(svg, "line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM }), x]);
    svg.addEventListener("click", (event) => {
      const box = svg.getBoundingClientRect();
      const place = (event.clientX - box.left) * chartWidth / box.width;
      go(Math.round((place - LEFT) / (chartWidth - LEFT - RIGHT) * count));
    });
    return { svg, head, x, y, count };
  };
  const layersChart = (title, unit, key, first) => {
    const rows = rollout.evictions.filter((one) => one[key]);
    if (!rows.length) return;
    const layers = rows[0][key].length;
    const points = rows.map((one) => [one.before_token, one[key]]);
    if (first) points.unshift([0, first]);
    const plot = chart(title, Math.max(...points.flatMap(([, values]) => values.map((value) => value || 0))), unit);
    for (let layer = 0; layer < layers; layer += 1) {
      const colour = layerColour(layer, layers);
      const known = points.filter(([, values]) => values[layer] !== null && values[layer] !== undefined);
      const path = known.map(([token, values], index) => `${index ? "L" : "M"}${plot.x(token)} ${plot.y(values[layer])}`).join("");
      draw(plot.svg, "path", { d: path, fill: "none", stroke: colour, "stroke-width": 1.6 });
      known.forEach(([token, values]) => draw(plot.svg, "circle", {
        cx: plot.x(token), cy: plot.y(values[layer]), r: points.length > 60 ? 1.6 : 2.8, fill: colour, class: "point",
        "data-tip": `layer ${layer + 1}, ${token === 0 ? "first state" : `eviction before token ${token}`}\n${title}: ${short(values[layer])}`,
      }));
      if (layers <= 8 || layer === 0 || layer === layers - 1) {
        const key = make("span", "key", `layer ${layer + 1}`);
        key.style.color = colour;
        plot.head.append(key);
      }
    }
  };
  const buildCharts = () => {
    find("charts").replaceChildren();
    cursors = [];
    chartWidth = Math.max(320, find("charts").clientWidth);
    const surprise = rollout.logprobs.map((value) => (value === null ? 0 : -value));
    const plot = chart("Surprise of each token", Math.max(0.01, ...surprise), "-log p, nats; dashed: evictions; click to go there");
    const width = Math.max(0.8, (chartWidth - LEFT - RIGHT) / plot.count - 1);
    surprise.forEach((value, token) => draw(plot.svg, "rect", {
      x: plot.x(token), y: plot.y(value), width, height: Math.max(0.6, plot.y(0) - plot.y(value)), fill: "rgb(var(--heat))", "data-token": token,
    }));
    layersChart("|S| after each eviction", "Frobenius norm of the running state, a line for each layer", "state_norm", rollout.first_state_norm);
    layersChart("|S_new - S_old| at each eviction", "Frobenius norm of the change", "state_change");
  };

  // --- the step -----------------------------------------------------------------------------------------------
  const slider = find("slider");
  const go = (to) => {
    const count = rollout.completion_tokens.length;
    step = Math.max(0, Math.min(count, to));
    slider.value = step;
    const kept = windowAt(step), prompt = rollout.prompt_tokens.length, inside = entered(step);
    tokens.forEach((span, index) => {
      const state = index > step || (index === step && step < count) ? "ahead"
        : index >= inside ? "" : isEvicted(index, step) ? "evicted" : "kept";
      span.className = `token ${state}${index === step ? " next" : ""}`;
    });
    cuts.forEach(([cut, before]) => cut.classList.toggle("past", before < inside));
    const now = find("now");
    now.replaceChildren(...rollout.prompt_tokens.map((text) => tokenSpan(text, "prompt")), make("span", "cut", "window"),
      ...kept.map((index) => {
        const span = tokenSpan(rollout.completion_tokens[index], "kept");
        span.dataset.token = index;
        return span;
      }));
    find("step").textContent = `token ${step} of ${count}`;
    const budget = rollout.window_tokens === null ? "no budget" : `budget ${rollout.window_tokens}`;
    find("cached").textContent = `${prompt} prompt + ${kept.length} reasoning tokens (${budget})`;
    find("evicted").textContent = `${inside - kept.length} tokens in ${evictionsBefore(step)} evictions`;
    const state = rollout.state_bytes || 0;
    find("bytes").textContent = `${bytes((prompt + kept.length) * rollout.token_bytes + state)}`
      + `${state ? ` (state ${bytes(state)})` : ""}, full cache ${bytes((prompt + inside) * rollout.token_bytes)}`;
    find("drawn").textContent = step < count
      ? `${visible(rollout.completion_tokens[step])}, log-prob ${rollout.logprobs[step] === null ? "-" : rollout.logprobs[step].toFixed(3)}` : "the completion has ended";
    cursors.forEach(([line, x]) => { line.setAttribute("x1", x(step)); line.setAttribute("x2", x(step)); });
  };
  slider.addEventListener("input", () => go(Number(slider.value)));
  viewer.addEventListener("click", (event) => {
    const target = event.target.closest("[data-step]");
    if (target) go(Number(target.dataset.step));
  });
  find("back").addEventListener("click", () => go(step - 1));
  find("on").addEventListener("click", () => go(step + 1));
  find("next-eviction").addEventListener("click", () => {
    const next = rollout.evictions.find((one) => one.before_token + 1 > step);
    if (next) go(next.before_token + 1);
  });

  // --- which completion ---------------------------------------------------------------------------------------
  const open = (group, index) => {
    rollout = groups[group].rollouts[index];
    leftAt = {};
    rollout.evictions.forEach((one) => one.evicted_tokens.forEach((token) => { leftAt[token] = one.before_token; }));
    [...find("picks").children].forEach((button, place) => button.setAttribute("aria-pressed", String(place === index)));
    slider.max = rollout.completion_tokens.length;
    const problem = find("problem");
    problem.replaceChildren(make("b", "", "Problem "), rollout.problem || "", make("br"), make("b", "", "Answer "),
      `${rollout.answer || "unknown"}: the completion is ${rollout.right ? "right" : "wrong"}`);
    buildStream();
    buildCharts();
    const last = rollout.evictions[Math.floor(rollout.evictions.length / 2)];
    go(last ? last.before_token + 1 : Math.floor(rollout.completion_tokens.length / 2));
  };
  const select = find("group");
  groups.forEach((group, index) => select.append(new Option(group.label, index)));
  const openGroup = (group) => {
    find("picks").replaceChildren(...groups[group].rollouts.map((one, index) => {
      const button = make("button", "pick");
      button.type = "button";
      button.append(make("span", one.right ? "right" : "wrong", one.right ? "✓ " : "✗ "), String(index + 1));
      button.dataset.tip = `${one.id}\n${one.right ? "right" : "wrong"}, ${one.completion_tokens.length} tokens, ${one.evictions.length} evictions`;
      button.addEventListener("click", () => open(group, index));
      return button;
    }));
    open(group, 0);
  };
  select.addEventListener("change", () => openGroup(Number(select.value)));
  let resizing;
  window.addEventListener("resize", () => {
    clearTimeout(resizing);
    resizing = setTimeout(() => { const at = step; buildCharts(); go(at); }, 150);
  });
  openGroup(0);
})();
