const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function draw() {
  for (const box of document.querySelectorAll(".plot")) {
    const figure = JSON.parse(box.nextElementSibling.textContent), layout = figure.layout;
    Object.assign(layout, {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: {family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--ink")},
      hoverlabel: {align: "left", bgcolor: css("--paper"), bordercolor: css("--line"), font: {color: css("--ink")}}});
    for (const axis of [layout.xaxis, layout.yaxis]) Object.assign(axis, {gridcolor: css("--grid"), linecolor: css("--line"), showline: true});
    for (const trace of figure.data) if (trace.error_y) trace.error_y.color = css("--ink");
    if (box.clientWidth < 480) layout.margin = {...layout.margin, l: 44, r: 8};
    layout.modebar = {bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--ink")};
    // Named buttons only, and no server: plotly's own set has one that uploads the figure.
    Plotly.react(box, figure.data, layout, {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], toImageButtonOptions: {format: "svg"}});
  }
}
function sort(head) {
  const table = head.closest("table"), column = head.cellIndex, up = head.getAttribute("aria-sort") !== "ascending";
  const key = row => { const cell = row.cells[column]; return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value); };
  const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  const rows = [...table.tBodies[0].rows].sort((a, b) => (up ? 1 : -1) * order(key(a), key(b)));
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  table.tBodies[0].append(...rows);
}
for (const head of document.querySelectorAll(".sortable th")) {
  head.tabIndex = 0;
  head.onclick = () => sort(head);
  head.onkeydown = event => { if (event.key === "Enter") sort(head); };
}
if (window.Plotly) { draw(); matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw); }
