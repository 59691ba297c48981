"""A picture of a terminal: ANSI text on stdin, SVG on stdout.

tmux capture-pane -ept kvrun | python docs/picture.py "kvrun chat" > docs/chat.svg
"""

import io
import sys

from rich.console import Console
from rich.text import Text

console = Console(record=True, width=92, file=io.StringIO(), force_terminal=True)
console.print(Text.from_ansi(sys.stdin.read().rstrip("\n")))
sys.stdout.write(console.export_svg(title=sys.argv[1]))
