"""Found copies as one HTML file: each pair side by side, the copied regions outlined in both.

It fetches nothing. Its script filters the pairs, moves between them by keys and lays the outlines on or off; without it
all pairs are there to be read, and to be printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from copynce.copies.pair import CopyPair
from copynce.copies.polygons import Points
from copynce.files import atomic_text
from copynce.inspect.page_pictures import PagePictures, printable


@dataclass(frozen=True)
class GroupMember:
    """A picture of a group. name: its path. size: (width, height) in pixels. note: facts to show with it (bytes, date).
    source_because: why it is likely the one that the others were copied from; empty where it is not."""

    name: str
    size: tuple[int, int]
    note: str = ""
    source_because: str = ""


@dataclass(frozen=True)
class PictureGroup:
    """Pairs that are shown together under a title: the copies that one query is, or those among the `members`, which
    are then shown first. In a group without members a pair's pictures are called query and reference."""

    title: str
    pairs: Sequence[CopyPair]
    note: str = ""
    members: Sequence[GroupMember] = ()


def groups_by_query(pairs: Sequence[CopyPair]) -> list[PictureGroup]:
    """A group for each query, the query with the most probable pair first; within it also the most probable first."""
    ordered = sorted(pairs, key=lambda pair: (-pair.probability, -pair.score, pair.query, pair.reference))
    groups: dict[str, list[CopyPair]] = {}
    for pair in ordered:
        groups.setdefault(pair.query, []).append(pair)
    return [PictureGroup(query, found) for query, found in groups.items()]


def write_copies_report(
    path: str | Path,
    groups: Sequence[PictureGroup],
    *,
    title: str,
    subtitle: str = "",
    link: bool = False,
    threads: int = 2,
) -> dict[str, str]:
    """Write the page, which appears whole or not at all, and tell which pictures cannot be shown in it: name -> why.

    groups: in the order in which they are shown. Names may be any bytes (in Python with surrogates). Pictures are
    embedded, each once, at most 480 pixels a side (down to 240 where there are thousands), or with `link` read from
    where they lie, at full size, if a browser shows them as they are stored. threads: that decode. Raises WriteError.
    """
    path = Path(path)
    link_from = path.absolute().parent if link else None
    with PagePictures(_names(groups), link_from=link_from, threads=threads) as pictures, atomic_text(path) as file:
        file.writelines(_page(groups, title, subtitle, pictures))
        return pictures.broken


def _names(groups: Sequence[PictureGroup]) -> Iterator[str]:
    """Of the pictures in the order in which the page shows them."""
    for group in groups:
        yield from (member.name for member in group.members)
        for pair in group.pairs:
            yield from (pair.query, pair.reference)


def _page(groups: Sequence[PictureGroup], title: str, subtitle: str, pictures: PagePictures) -> Iterator[str]:
    count = sum(len(group.pairs) for group in groups)
    kind = "group" if any(group.members for group in groups) else "query"
    yield (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>{_text(title)}</title><style>{_STYLE}</style>"
        f"<script>{_MISSING}</script></head>"
        f"<body data-kind='{kind}'><header class='top'><h1>{_text(title)}</h1>"
    )
    if subtitle:
        yield f"<p>{_text(subtitle)}</p>"
    yield f"</header>\n{_BAR}<main>\n" if count else "</header>\n<main><p>No copies.</p>\n"
    for group in groups:
        yield f"<section class='group'><h2>{_named(group.title)}</h2>"
        if group.note:
            yield f"<p>{_text(group.note)}</p>"
        if group.members:
            yield "<div class='members'>"
            yield from (_member(member, pictures) for member in group.members)
            yield "</div>"
        roles = ("", "") if group.members else ("query", "reference")
        sources = {member.name for member in group.members if member.source_because}
        yield from (_pair(pair, roles, sources, pictures) for pair in group.pairs)
        yield "</section>\n"
    yield f"<p id='none' hidden>No pair passes the filter.</p></main>{_KEYS}"
    yield f"<script>{_SCRIPT}</script></body></html>\n"


def _member(member: GroupMember, pictures: PagePictures) -> str:
    facts = [_size(member.size), *([_text(member.note)] if member.note else [])]
    mark = f"<div class='source'>likely source: {_text(member.source_because)}</div>" if member.source_because else ""
    return (
        f"<figure><div class='picture' style='{_shape(member.size)}'>"
        f"{pictures.html(member.name, printable(member.name))}</div>"
        f"<figcaption>{mark}{_named(member.name)}<div>{' · '.join(facts)}</div></figcaption></figure>"
    )


def _pair(pair: CopyPair, roles: tuple[str, str], sources: set[str], pictures: PagePictures) -> str:
    region = pair.region
    what = "copy" if pair.probability >= 0.5 else "perhaps a copy"
    facts = [
        what if region.found else f"{what}, place unknown",
        *(["mirrored"] if region.found and region.mirrored else []),
        f"cosine {pair.score:.3f}",
    ]
    percent = _percent(pair.probability)
    sides = zip(
        roles,
        (pair.query, pair.reference),
        (pair.query_size, pair.reference_size),
        (region.query, region.reference) if region.found else (None, None),
        (region.query_share, region.reference_share),
        strict=True,
    )
    figures = []
    for role, name, size, polygon, share in sides:
        copied = f" · <b>{_share(share)}</b> of it is copied" if region.found else ""
        mark = "<span class='source'>likely source</span> " if name in sources else ""
        called = f"<span class='role'>{role}</span> " if role else ""
        figures.append(
            f"<figure><div class='room'><div class='picture' style='{_shape(size)}'>"
            f"{pictures.html(name, f'{role} {printable(name)}'.strip())}{_outline(polygon, size)}</div></div>"
            f"<figcaption>{called}{mark}{_named(name)}<div>{_size(size)}{copied}</div></figcaption></figure>"
        )
    return (
        f"<article class='pair' tabindex='-1' data-percent='{percent}' aria-label='{percent} %, {facts[0]}'>"
        f"<div class='facts'><strong>{percent} %</strong> {' · '.join(facts)}</div>"
        f"<div class='sides'>{''.join(figures)}</div></article>\n"
    )


def _outline(polygon: Points | None, size: tuple[int, int]) -> str:
    """What lies beyond the region dimmed, its outline, and a dot at its first corner, which is the same in both."""
    if polygon is None or not len(polygon):
        return ""
    width, height = size
    corners = "L".join(f"{x:.1f} {y:.1f}" for x, y in polygon)
    x, y = polygon[0]
    return (
        f"<svg viewBox='0 0 {width} {height}' preserveAspectRatio='none' aria-hidden='true'>"
        f"<path class='beyond' d='M0 0H{width}V{height}H0ZM{corners}Z'/><path class='rim' d='M{corners}Z'/>"
        f"<path class='region' d='M{corners}Z'/><path class='dot' d='M{x:.1f} {y:.1f}h0'/></svg>"
    )


def _shape(size: tuple[int, int]) -> str:
    return f"--w:{size[0]};--h:{size[1]}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} &times; {size[1]} px"


def _percent(probability: float) -> str:
    """Rounded down, so that only certainty is 100 and a filter by what is read drops nothing that it names."""
    return f"{math.floor(probability * 1000 + 1e-6) / 10:.1f}"


def _share(share: float) -> str:
    return "&lt; 1 %" if share < 0.01 else f"{share:.0%}".replace("%", " %")


def _text(text: str) -> str:
    return escape(printable(text))


def _named(name: str) -> str:
    """A path, its last part stressed."""
    folder, slash, last = name.rpartition("/")
    return f"<span class='name'>{_text(folder + slash)}<b>{_text(last)}</b></span>"


#: What the page may load: its own style and script, pictures within it and files.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: file: 'self'"

_BAR = """<form class='bar' id='bar' role='search' aria-label='Filter' autocomplete='off'>
<label>Probability at least <input type='range' id='slider' min='0' max='100' step='1' value='0'></label>
<label><input type='number' id='least' min='0' max='100' step='0.1' value='0' aria-label='Percent'> %</label>
<label>Name contains <input type='text' id='text' spellcheck='false' size='18'></label>
<label><input type='checkbox' id='outlines' checked> Outlines</label>
<button type='button' id='help'>Keys <kbd>?</kbd></button>
<output id='count' aria-live='polite'></output>
<noscript>Filters, keys and pictures that occur once more need scripts.</noscript></form>
"""

_KEYS = """<dialog id='keys'><h2>Keys</h2><dl>
<dt><kbd>j</kbd> <kbd>↓</kbd></dt><dd>next pair</dd><dt><kbd>k</kbd> <kbd>↑</kbd></dt><dd>pair before</dd>
<dt><kbd>J</kbd> <kbd>K</kbd></dt><dd>first pair of the next heading, of the one before</dd>
<dt><kbd>o</kbd></dt><dd>outlines on or off</dd>
<dt><kbd>/</kbd></dt><dd>filter by name; <kbd>Enter</kbd> or <kbd>Esc</kbd> goes back to the pairs</dd>
<dt><kbd>p</kbd></dt><dd>filter by probability</dd><dt><kbd>?</kbd></dt><dd>these keys</dd></dl>
<p>The outline is the copied region; its dot marks the same corner in both pictures, so that a turned or mirrored copy
shows. "Place unknown": the pictures are alike as copies are, but too little speaks for one place.</p>
<form method='dialog'><button>Close</button></form></dialog>"""

_STYLE = """
:root{color-scheme:light dark;--page:#f3f4f6;--card:#fff;--ink:#20242c;--soft:#565d6b;--line:#dfe2e8;--mark:#2563eb;
--good:#147a3e;--room:320px}
@media(prefers-color-scheme:dark){:root{--page:#14171c;--card:#1d2127;--ink:#e8eaee;--soft:#a3abb8;--line:#363c47;
--mark:#7aa7ff;--good:#5fd08c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.top,main,.bar{max-width:1200px;margin:0 auto;padding:0 24px}
.top{padding-top:32px}
h1{font-size:28px;line-height:1.2;margin:0;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:16px;margin:0 0 8px;font-weight:400;overflow-wrap:anywhere}
p{margin:6px 0;max-width:80ch;color:var(--soft)}
.bar{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:6px 18px;align-items:center;padding:10px 24px;
background:var(--page);border-bottom:1px solid var(--line);font-size:14px}
.bar label{display:inline-flex;align-items:center;gap:6px}
input,button{font:inherit;color:inherit}
input[type=text],input[type=number],button{background:var(--card);border:1px solid var(--line);border-radius:6px;
padding:3px 8px}
input[type=number]{width:80px}
input[type=range],input[type=checkbox]{accent-color:var(--mark)}
output{margin-left:auto;font-weight:600;font-variant-numeric:tabular-nums}
:focus-visible,.pair:focus{outline:3px solid var(--mark);outline-offset:2px}
.group{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin-top:18px}
.pair{padding:12px;margin:10px -12px 0;border-radius:10px;border-top:1px solid var(--line);
content-visibility:auto;contain-intrinsic-size:auto 450px}
h2+.pair{border-top:0;margin-top:0}
.facts{font-variant-numeric:tabular-nums;margin-bottom:8px}
.facts strong{font-size:20px;margin-right:8px}
.sides{display:grid;grid-template-columns:1fr 1fr;gap:20px}
figure{margin:0;min-width:0}
.room{height:var(--room);display:flex;align-items:center;justify-content:center;background:var(--page);
border-radius:8px}
.picture{position:relative;width:min(100%,calc(var(--room)*var(--w)/var(--h)));min-width:12px;
min-height:12px;max-height:var(--room);aspect-ratio:var(--w)/var(--h)}
.picture img{position:absolute;inset:0;width:100%;height:100%;background:#fff;image-orientation:none;font-size:12px;
color:#565d6b}
.picture svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.absent{position:absolute;inset:0;display:flex;align-items:center;justify-content:center;text-align:center;padding:6px;
font-size:12px;color:var(--soft);border:1px dashed var(--line);overflow-wrap:anywhere}
.picture:has(.absent){width:100%;height:100%;aspect-ratio:auto}
svg path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round}
svg .beyond{fill:#000;fill-opacity:.42;fill-rule:evenodd}
svg .rim{stroke:#000;stroke-width:5}
svg .region{stroke:#40dcff;stroke-width:2.5;fill:#40dcff;fill-opacity:.12}
svg .dot{stroke:#ffd60a;stroke-width:11;stroke-linecap:round}
.bare svg{display:none}
figcaption{font-size:13px;color:var(--soft);margin-top:6px;overflow-wrap:anywhere;line-height:1.4;
font-variant-numeric:tabular-nums}
figcaption b{color:var(--ink);font-weight:600}
.role{text-transform:uppercase;font-size:11px;letter-spacing:.05em;margin-right:4px}
.source{color:var(--good);font-weight:600}
.members{--room:150px;display:flex;flex-wrap:wrap;gap:14px;margin:10px 0 16px}
.members figure{width:190px}
.members .picture:has(.absent){height:var(--room)}
kbd{border:1px solid var(--line);border-radius:4px;padding:0 5px;background:var(--page);
font:12px ui-monospace,monospace}
dialog{background:var(--card);color:var(--ink);border:1px solid var(--line);border-radius:12px;max-width:560px;
padding:20px 24px}
dialog::backdrop{background:rgb(0 0 0/.45)}
dialog p,dialog form{margin-top:14px}
dl{display:grid;grid-template-columns:auto 1fr;gap:6px 16px;margin:0}
dd{margin:0}
[hidden]{display:none!important}
@media(max-width:640px){:root{--room:220px}.bar{position:static}
.top,main,.bar{padding-left:12px;padding-right:12px}.sides{gap:10px}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#ccc;--good:#147a3e;--room:230px}
.bar,dialog{display:none}.group{border:0;padding:0}.pair{content-visibility:visible;break-inside:avoid}
svg{print-color-adjust:exact}h2{break-after:avoid}}
"""

#: Of a linked picture that has gone since; it stands before the pictures, to hear of all.
_MISSING = """
addEventListener('error',event=>{
  if(event.target.tagName!=='IMG')return;
  const words=document.createElement('span');
  words.className='absent';words.textContent='cannot be shown: '+event.target.alt;event.target.replaceWith(words);
},true);
"""

_SCRIPT = """
(()=>{
const at=id=>document.getElementById(id),all=(q,e=document)=>[...e.querySelectorAll(q)];
for(const img of all('img[data-same]'))img.setAttribute('src',at(img.dataset.same).getAttribute('src'));
const pairs=all('.pair');
if(!pairs.length)return;
const groups=all('.group'),groupOf=pairs.map(p=>p.parentNode),percents=pairs.map(p=>+p.dataset.percent);
const names=pairs.map(p=>all('.name',p).map(n=>n.textContent).join('\\n').toLowerCase());
const slider=at('slider'),least=at('least'),text=at('text'),outlines=at('outlines'),count=at('count'),keys=at('keys');
const plural={group:'groups',query:'queries'}[document.body.dataset.kind];
let current=0,chosen=false,written=null,timer=0;
const load=which=>{for(const img of all('.pair:not([hidden]) '+which))img.loading='eager';};
const show=()=>{
  const floor=+least.value||0,part=text.value.trim().toLowerCase(),open=new Set();
  let kept=0;
  pairs.forEach((pair,i)=>{
    pair.hidden=percents[i]<floor||!names[i].includes(part);
    if(!pair.hidden){kept++;open.add(groupOf[i]);}
  });
  for(const group of groups)group.hidden=!open.has(group);
  document.body.classList.toggle('bare',!outlines.checked);
  at('none').hidden=kept>0;
  if(kept<=100)load('img:is([id],[data-same])');  // so many are printed, and printing does not wait for lazy ones
  count.textContent=kept+' of '+pairs.length+' pairs in '+open.size+' of '+groups.length+' '+plural;
};
const write=()=>{
  const state=new URLSearchParams();
  if(+least.value)state.set('least',least.value);
  if(text.value.trim())state.set('name',text.value.trim());
  if(!outlines.checked)state.set('outlines','off');
  if(chosen)state.set('pair',current+1);
  written=state.toString();
  try{history.replaceState(null,'','#'+written);}catch{location.replace('#'+written);}
};
const changed=()=>{show();clearTimeout(timer);timer=setTimeout(write,150);};
const go=(i,save=true)=>{
  pairs[current].tabIndex=-1;current=i;chosen=true;pairs[i].tabIndex=0;
  document.documentElement.style.scrollPaddingTop=at('bar').offsetHeight+8+'px';
  pairs[i].focus({preventScroll:true});
  // Twice: what was never laid out has a guessed height until it comes near.
  pairs[i].scrollIntoView({block:'start'});
  requestAnimationFrame(()=>pairs[i].scrollIntoView({block:'start'}));
  if(save)changed();
};
const move=(step,fits=()=>true)=>{
  let i=chosen?current+step:step>0?0:-1;
  while(i>=0&&i<pairs.length&&(pairs[i].hidden||!fits(i)))i+=step;
  if(pairs[i])go(i);
};
const back=()=>{if(pairs[current].hidden)move(1);else go(current);};
const isFirst=i=>!pairs.some((p,k)=>k<i&&!p.hidden&&groupOf[k]===groupOf[i]);
const read=()=>{
  if(location.hash.slice(1)===written)return;
  const state=new URLSearchParams(location.hash.slice(1)),number=Math.round(+state.get('pair'))-1;
  least.value=Math.max(0,Math.min(100,+state.get('least')||0));
  slider.value=least.value;
  text.value=state.get('name')||'';
  outlines.checked=state.get('outlines')!=='off';
  show();
  if(pairs[number]&&!pairs[number].hidden)go(number,false);
};
slider.addEventListener('input',()=>{least.value=slider.value;changed();});
least.addEventListener('input',()=>{slider.value=least.value;changed();});
text.addEventListener('input',changed);
outlines.addEventListener('change',changed);
at('help').addEventListener('click',()=>keys.showModal());
at('bar').addEventListener('submit',event=>event.preventDefault());
pairs.forEach((pair,i)=>pair.addEventListener('mousedown',()=>{
  pairs[current].tabIndex=-1;current=i;chosen=true;pair.tabIndex=0;changed();
}));
addEventListener('hashchange',read);
addEventListener('beforeprint',()=>load('img'));
document.addEventListener('keydown',event=>{
  if(event.ctrlKey||event.metaKey||event.altKey)return;
  const {key,target}=event,field=target===text||target===least;
  if((field&&(key==='Enter'||key==='Escape'))||(target===slider&&key==='Escape')){event.preventDefault();back();return;}
  if(field||(target===slider&&key.startsWith('Arrow')))return;
  if(keys.open){if(key==='?')keys.close();return;}
  if(key==='j'||key==='ArrowDown')move(1);
  else if(key==='k'||key==='ArrowUp')move(-1);
  else if(key==='J')move(1,isFirst);
  else if(key==='K')move(-1,isFirst);
  else if(key==='o'){outlines.checked=!outlines.checked;changed();}
  else if(key==='/'){text.focus();text.select();}
  else if(key==='p'){least.focus();least.select();}
  else if(key==='?')keys.showModal();
  else return;
  event.preventDefault();
});
pairs[0].tabIndex=0;
show();
read();
})();
"""
