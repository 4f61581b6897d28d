"""report.html: the page, its figures as SVG, and the data of its trace viewer."""
