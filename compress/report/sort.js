// A click on the head of a column sorts its table; another turns it round. Figures are sorted as figures.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.firstElementChild?.dataset.value ?? cell.textContent;
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending" || (head.classList.contains("n") && !head.hasAttribute("aria-sort"));
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      const [m, n] = [parseFloat(x), parseFloat(y)];
      if (!head.classList.contains("n")) return x.localeCompare(y, undefined, { numeric: true });
      return (isNaN(m) ? -Infinity : m) - (isNaN(n) ? -Infinity : n);
    });
    table.tBodies[0].append(...(down ? rows.reverse() : rows));
  }));
}
