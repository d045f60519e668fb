"""Two pictures of which every patch can be asked where in the other it is found: a part of a report.

A click (or Tab, then the arrow keys) chooses a patch; the other picture shows the softmax over its patches (equation 6)
as heat, and a line tells the numbers. Works from the file alone: pictures, cosines and script are within.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from copynce.copies.polygons import Points
from copynce.inspect.report import data_url

_SHOWN = 720  # pixels a side of an embedded picture
_COLOURS = 32  # of the heat's scale


@dataclass(frozen=True)
class PatchPair:
    """The part of a report; see the module's text.

    images: both pictures. names: theirs. cosines: float [Lq, Lr] of their patch tokens. temperature: of the softmax.
    regions: polygon [n, 2] in pixels of each picture, None where unknown. probe: the query's patch that is shown first.
    """

    images: tuple[Image.Image, Image.Image]
    names: tuple[str, str]
    cosines: NDArray[np.float64]
    temperature: float
    regions: tuple[Points | None, Points | None]
    probe: int = 0

    def html(self) -> str:
        """The block, its style and its script."""
        grids = [round(length**0.5) for length in self.cosines.shape]
        scale = colormaps["inferno"](np.linspace(0, 1, _COLOURS))[:, :3] * 255
        facts = {
            # Thousandths are finer than what a temperature of 1/16 makes visible.
            "cosines": np.rint(self.cosines * 1000).astype(int).tolist(),
            "temperature": self.temperature,
            "grids": grids,
            "probe": self.probe,
            "colours": ["rgb({},{},{})".format(*row) for row in scale.astype(int).tolist()],
        }
        panels = [
            _panel(side, image, name, grid, region)
            for side, image, name, grid, region in zip(
                (0, 1), self.images, self.names, grids, self.regions, strict=True
            )
        ]
        data = json.dumps(facts, separators=(",", ":"))
        return (
            f"<style>{_STYLE}</style><div class='pair' id='pair'>{''.join(panels)}</div>"
            "<p class='told' id='told' aria-live='polite'></p>"
            "<p class='keys'>Click a patch of either picture, or move with <kbd>Tab</kbd> and the arrow keys; "
            "<kbd>e</kbd> shows the affinity entropy, <kbd>r</kbd> the copied region.</p>"
            "<noscript><p>The patches answer where scripts may run; inspect.png shows a few of them.</p></noscript>"
            f"<script type='application/json' id='patches'>{data}</script><script>{_SCRIPT}</script>"
        )


def _panel(side: int, image: Image.Image, name: str, grid: int, region: Points | None) -> str:
    small = image.convert("RGB")
    small.thumbnail((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    w, h = small.size
    outline = ""
    if region is not None and len(region):
        points = np.asarray(region) * [w / image.width, h / image.height]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        outline = f"<polygon class='rim' points='{corners}'/><polygon class='region' points='{corners}'/>"
    cells = "".join(
        f"<rect x='{x * w / grid:.2f}' y='{y * h / grid:.2f}' width='{w / grid:.2f}' height='{h / grid:.2f}' "
        f"data-patch='{y * grid + x}'/>"
        for y in range(grid)
        for x in range(grid)
    )
    title = escape(f"{'query' if side == 0 else 'reference'}: {name}", quote=True)
    return (
        f"<div class='side'><div class='title'>{title}</div>"
        f"<svg viewBox='0 0 {w} {h}' data-side='{side}' tabindex='0' role='application' "
        f"aria-label='{title}, {grid} by {grid} patches; arrow keys choose one'>"
        f"<image href='{data_url(small, True)}' width='{w}' height='{h}'/><g class='cells'>{cells}</g>{outline}"
        "<rect class='probe' width='0' height='0'/></svg></div>"
    )


def peaks(cosines: NDArray[np.float64], temperature: float, allowed: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the `allowed` patches of the query to begin with: the surest of their place, apart from each
    other."""
    logits = cosines / temperature
    sure = 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
    grid = round(len(cosines) ** 0.5)
    chosen: list[int] = []
    for patch in sorted(allowed, key=lambda patch: (-sure[patch], patch)):
        here = divmod(patch, grid)
        if all(max(abs(here[k] - divmod(other, grid)[k]) for k in (0, 1)) > grid // 4 for other in chosen):
            chosen.append(int(patch))
    return chosen[:count]


_STYLE = """
.pair{display:flex;flex-wrap:wrap;gap:20px;align-items:flex-start}
.side{flex:1 1 380px;min-width:0}
.title{font-size:13px;font-weight:600;margin-bottom:6px;overflow-wrap:anywhere}
.pair svg{display:block;width:100%;max-height:76vh;border-radius:8px;background:#e9ebf0;cursor:crosshair}
.pair svg:focus-visible{outline:3px solid #2563eb;outline-offset:2px}
.cells rect{fill:transparent;fill-opacity:.66;stroke:#fff;stroke-opacity:.16;stroke-width:.6}
.probe{fill:none;stroke:#ffd60a;stroke-width:3;pointer-events:none}
.rim,.region{fill:none;stroke:#000;stroke-width:5;stroke-linejoin:round;pointer-events:none}
.region{stroke:#40dcff;stroke-width:2.5;fill:#40dcff;fill-opacity:.1}
.bare .rim,.bare .region{display:none}
.told{margin:14px 0 4px;color:#20242c;max-width:none;min-height:3.1em;font-variant-numeric:tabular-nums}
.keys{font-size:13px;margin:0}
kbd{border:1px solid #c9cdd6;border-radius:4px;padding:0 5px;background:#f8f9fb;font:12px ui-monospace,monospace}
"""

_SCRIPT = """
(()=>{
const facts=JSON.parse(document.getElementById('patches').textContent),pair=document.getElementById('pair');
const told=document.getElementById('told'),views=[...pair.querySelectorAll('svg')];
const cells=views.map(v=>[...v.querySelectorAll('.cells rect')]),marks=views.map(v=>v.querySelector('.probe'));
const words=['query','reference'];let side=0,patch=facts.probe,entropyShown=false;
const affinity=(s,i)=>{
  const row=s===0?facts.cosines[i]:facts.cosines.map(r=>r[i]),top=Math.max(...row);
  const e=row.map(c=>Math.exp((c-top)/1000/facts.temperature)),sum=e.reduce((a,b)=>a+b,0);
  return {p:e.map(v=>v/sum),cosine:top/1000};
};
const entropy=p=>-p.reduce((a,v)=>a+(v>0?v*Math.log(v):0),0);
const place=(s,i)=>'row '+(Math.floor(i/facts.grids[s])+1)+', column '+(i%facts.grids[s]+1);
const paint=(s,heat)=>cells[s].forEach((c,i)=>{
  c.style.fill=heat?facts.colours[Math.round(Math.max(0,Math.min(1,heat[i]))*(facts.colours.length-1))]:'transparent';
});
const show=()=>{
  const {p,cosine}=affinity(side,patch),other=1-side,best=p.indexOf(Math.max(...p));
  const mark=(s,i)=>{
    for(const k of ['x','y','width','height'])marks[s].setAttribute(k,cells[s][i].getAttribute(k));
  };
  mark(side,patch);mark(other,best);
  paint(other,p.map(v=>v/p[best]));
  paint(side,null);
  if(entropyShown){
    const all=cells[side].map((_,i)=>entropy(affinity(side,i).p)),most=Math.log(p.length);
    paint(side,all.map(v=>v/most));
  }
  told.textContent='Patch '+place(side,patch)+' of the '+words[side]+': most of its affinity, '+
    (100*p[best]).toFixed(1)+' %, goes to '+place(other,best)+' of the '+words[other]+' (cosine '+
    cosine.toFixed(3)+'); entropy '+entropy(p).toFixed(2)+' of at most '+Math.log(p.length).toFixed(2)+' nats.'+
    (entropyShown?' The '+words[side]+' shows entropy: dark patches know their place.':'');
};
const choose=(s,i)=>{side=s;patch=i;show();};
views.forEach((view,s)=>{
  view.addEventListener('click',event=>{
    const cell=event.target.closest('[data-patch]');
    if(cell)choose(s,+cell.dataset.patch);
  });
  view.addEventListener('focus',()=>{if(side!==s)choose(s,affinityOf(s));});
  view.addEventListener('keydown',event=>{
    const g=facts.grids[s];let [y,x]=[Math.floor(patch/g),patch%g];
    if(event.key==='ArrowLeft')x--;else if(event.key==='ArrowRight')x++;
    else if(event.key==='ArrowUp')y--;else if(event.key==='ArrowDown')y++;else return;
    event.preventDefault();
    choose(s,Math.max(0,Math.min(g-1,y))*g+Math.max(0,Math.min(g-1,x)));
  });
});
const affinityOf=s=>{const p=affinity(side,patch).p;return s===side?patch:p.indexOf(Math.max(...p));};
document.addEventListener('keydown',event=>{
  if(event.ctrlKey||event.metaKey||event.altKey)return;
  if(event.key==='e'){entropyShown=!entropyShown;show();}
  if(event.key==='r')pair.classList.toggle('bare');
});
show();
})();
"""
