"use strict";
// Sorts the table by the column that is clicked; numbers as numbers, unknown ones last.
(() => {
  const body = document.querySelector("tbody");
  document.querySelectorAll("thead th[data-sort]").forEach((head) => {
    const column = head.cellIndex;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.textContent = "";
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      document.querySelectorAll("thead th").forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (head.dataset.sort === "number") {
          if (x === "" || y === "") return (x === "") - (y === "");
          return (up ? 1 : -1) * (Number(x) - Number(y));
        }
        return (up ? 1 : -1) * x.localeCompare(y);
      });
      body.append(...rows);
    });
  });
})();
