"""The colours of pages and figures, in a light and a dark scheme. Colour-blind readers can tell them apart."""

# Figures are made in the light colours; the page replaces them where the reader's system is dark.
INK, MUTED, GRID, PAPER, SOFT = "#1b2530", "#596673", "#dfe4e9", "#ffffff", "#f4f6f8"
BLUE, AMBER, TEAL, PURPLE = "#0b63b0", "#a86f00", "#00806a", "#8e4b96"
ROSE, RUST, BLACK, GREY, GREEN, BROWN = "#b03068", "#c2410c", "#2a333c", "#6c7782", "#3c7d23", "#7a5a2f"
GOOD, BAD = "#00705c", "#b3261e"
# light colour -> dark colour
DARK = {
    INK: "#e8edf2",
    MUTED: "#a6b1bc",
    GRID: "#343d47",
    PAPER: "#171c22",
    SOFT: "#1f262e",
    BLUE: "#6db4f3",
    AMBER: "#e6ae42",
    TEAL: "#45c8ae",
    PURPLE: "#cf96d7",
    ROSE: "#f28bb0",
    RUST: "#fb8c5c",
    BLACK: "#d5dce3",
    GREY: "#95a0ab",
    GREEN: "#88cb6c",
    BROWN: "#c9a876",
    GOOD: "#45c8ae",
    BAD: "#ff9a8f",
}
# light colour -> colour in print: darker text and lines, and no filled boxes
PRINT = {MUTED: "#47535f", GRID: "#c9d0d6", SOFT: PAPER}

# variables of page.css
_VARIABLES = {
    "ink": INK,
    "muted": MUTED,
    "line": GRID,
    "paper": PAPER,
    "soft": SOFT,
    "accent": BLUE,
    "good": GOOD,
    "bad": BAD,
}


def css_variables() -> str:
    """The colours as the CSS variables that `page.css` uses, for light and dark screens and for print."""
    light, dark, printed = (
        ":root{" + "".join(f"--{name}:{scheme.get(color, color)};" for name, color in _VARIABLES.items()) + "}"
        for scheme in ({}, DARK, PRINT)
    )
    return f"{light}\n@media (prefers-color-scheme: dark){{{dark}}}\n@media print{{{printed}}}\n"
