// Draws outlines of labels over the pictures, after page.js has made its viewer of them:
// one group of paths per layer, which a button or a key shows and hides.
(() => {
  const data = JSON.parse(document.getElementById("outlines").textContent);
  const viewer = document.querySelector(".mode");
  const legend = document.querySelector(".labels");
  const space = legend.querySelector("svg").namespaceURI;
  viewer.append(legend);

  function make(name, attributes, parent) {
    const element = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  }

  const figures = [...viewer.querySelectorAll("figure")].map((figure) => {
    const plane = figure.dataset.plane;
    const [width, height] = data.size[plane];
    const svg = make("svg", { class: "outlines", viewBox: `0 0 ${width} ${height}` }, figure.querySelector(".frame"));
    svg.setAttribute("aria-hidden", true);
    const groups = data.layers.map((layer) => make("g", { class: layer.name }, svg));
    const slider = figure.querySelector("input");
    const draw = () => groups.forEach((group, i) => {
      const { title, planes } = data.layers[i];
      group.replaceChildren();
      for (const [label, d] of Object.entries(planes[plane][slider.value])) {
        const path = make("path", { d, stroke: data.colors[label] }, group);
        make("title", {}, path).textContent = `${title}: ${label}`;
      }
    });
    slider.addEventListener("input", draw);
    draw();
    return groups;
  });

  const bar = document.createElement("div");
  bar.className = "modes layers";
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "Outlines");
  const buttons = data.layers.map((layer, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "key " + layer.key;
    button.setAttribute("aria-pressed", true);
    const line = make("svg", { class: "line " + layer.name, viewBox: "0 0 20 8" }, button);
    line.setAttribute("aria-hidden", true);
    make("path", { d: "M0 4h20", stroke: "currentColor" }, line);
    button.append(layer.title);
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", shown);
      for (const groups of figures) groups[i].setAttribute("display", shown ? "inline" : "none");
    });
    bar.append(button);
    return button;
  });
  viewer.querySelector("h3").before(bar);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    buttons[data.layers.findIndex((layer) => layer.key === event.key)]?.click();
  });
})();
