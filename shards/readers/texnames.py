"""The names that LaTeX documents use: environments, headings, accents, letters, and commands that hold no text."""

from __future__ import annotations

MATHS = "equation|align|alignat|flalign|gather|multline|eqnarray|displaymath|math|dmath|split|cases|array|IEEEeqnarray|subequations"
DROPPED = "thebibliography|tabular|tabularx|tabulary|longtable|tikzpicture|pspicture|picture|filecontents|CCSXML|acks|comment"
HEADINGS = {"part": 1, "chapter": 1, "section": 2, "subsection": 3, "subsubsection": 4, "paragraph": 5, "subparagraph": 6}
ACCENTS = {
    "`": "\u0300", "'": "\u0301", "^": "\u0302", "~": "\u0303", "=": "\u0304", "u": "\u0306", ".": "\u0307", '"': "\u0308",
    "r": "\u030a", "H": "\u030b", "v": "\u030c", "c": "\u0327", "k": "\u0328", "d": "\u0323", "b": "\u0331",
}  # fmt: skip
LETTERS = {
    "ss": "ß", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "aa": "å", "AA": "Å", "o": "ø", "O": "Ø", "l": "ł", "L": "Ł",
    "i": "ı", "j": "ȷ", "dh": "ð", "DH": "Ð", "th": "þ", "TH": "Þ", "S": "§", "P": "¶", "copyright": "©", "pounds": "£",
    "dots": "…", "ldots": "…", "textellipsis": "…", "LaTeX": "LaTeX", "TeX": "TeX", "textbackslash": "\\",
    "textasciitilde": "~", "textendash": "–", "textasciicircum": "^", "textemdash": "—", "textquoteright": "’",
    "textquoteleft": "‘", "textdegree": "°", "euro": "€", "par": "\n\n", "newline": "\n", "linebreak": "\n", "quad": " ",
    "qquad": " ", "textbar": "|", "textless": "<", "textgreater": ">",
}  # fmt: skip
WITHOUT = frozenset(
    (
        "label", "ref", "eqref", "pageref", "autoref", "cref", "Cref", "nameref", "vref", "cite", "citep", "citet", "citealp",
        "citealt", "citeauthor", "citeyear", "citeyearpar", "citenum", "nocite", "parencite", "textcite", "footcite", "autocite",
        "bibliography", "bibliographystyle", "includegraphics", "vspace", "hspace", "pagestyle", "thispagestyle", "setlength",
        "addtolength", "setcounter", "addtocounter", "usepackage", "documentclass", "input", "include", "index", "thanks", "author",
        "date", "affiliation", "affil", "institute", "email", "address", "keywords", "pacs", "graphicspath", "newtheorem",
        "theoremstyle", "hypersetup", "definecolor", "color", "pagenumbering", "addcontentsline", "markboth", "numberwithin",
        "thanksref", "orcid", "fontsize", "selectlanguage", "newcounter", "stepcounter", "refstepcounter", "hyphenation", "phantom",
        "hphantom", "vphantom", "rule", "epsfig", "epsfbox", "psfig", "inst", "titlerunning", "authorrunning", "institution",
        "captionsetup", "newlength", "allowdisplaybreaks", "bibitem",
    )
)  # fmt: skip
"""Commands that go with their arguments: nothing in these is text."""
TWO = frozenset(
    (
        "setlength", "addtolength", "setcounter", "addtocounter", "definecolor", "markboth", "newtheorem", "rule", "fontsize",
    )
)  # fmt: skip
SECOND = frozenset(
    (
        "href", "textcolor", "colorbox", "texorpdfstring", "raisebox", "multicolumn", "scalebox", "resizebox", "parbox",
    )
)  # fmt: skip
"""Commands of whose arguments the last one is text."""
