"""The page's style sheet."""

from __future__ import annotations

# Okabe and Ito's palette, which stays apart for colour-blind readers; darker or lighter for contrast on each ground.
STYLE = """
:root{--bg:#fff;--card:#f6f7f9;--ink:#1a1d21;--dim:#5b6470;--line:#d9dde3;--good:#0a7a4b;--bad:#b3261e;--warn:#8a5a00;
--mark:#eaf6ef;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#a8588a;--c4:#9a7d00;--c5:#2b8cbe;--c6:#6b4fa0;--c7:#555}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1d2127;--ink:#e8eaed;--dim:#a0a8b3;--line:#363c45;
--good:#5fd39c;--bad:#ff8a80;--warn:#f0c060;--mark:#17301f;--c0:#56b4e9;--c1:#ff9a4d;--c2:#3fd0a0;--c3:#e29bc6;--c4:#f0e442;
--c5:#8ecbff;--c6:#b9a3f0;--c7:#bbb}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 16px 48px}
h1{margin:0;font-size:26px;line-height:1.2;overflow-wrap:anywhere}h2{font-size:18px;margin:32px 0 8px}
h3{font-size:15px;margin:14px 0 4px}
.kind,.when{margin:0;color:var(--dim)}
.verdict,.headline{border-radius:8px;padding:12px 16px;margin:16px 0;background:var(--card);border-left:5px solid var(--line);
overflow-wrap:anywhere}
.verdict.pass{border-color:var(--good)}.verdict.fail{border-color:var(--bad)}.verdict.inconclusive{border-color:var(--warn)}
.verdict ul{margin:6px 0 0;padding-left:20px}.headline{border-color:var(--good)}.headline p{margin:0 0 8px}
.headline ul{display:flex;flex-wrap:wrap;gap:10px 32px;list-style:none;margin:0;padding:0}
.headline b{display:block;font-size:22px;line-height:1.25;font-variant-numeric:tabular-nums}.headline span{color:var(--dim);font-size:13px}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;text-align:left;white-space:nowrap;border-bottom:1px solid var(--line);vertical-align:baseline}
th{color:var(--dim);font-weight:600}.fig{text-align:right}td small{color:var(--dim);display:block;font-size:12px}
tr.first td{border-top:2px solid var(--line)}tr.best td{background:var(--mark);font-weight:600}
tr.skipped td,tr.built td{color:var(--dim)}.state.failed{color:var(--bad)}.unstable{color:var(--bad);font-weight:700;font-size:12px}
a{color:inherit}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:12px 0}dt{color:var(--dim)}
dd{margin:0;overflow-wrap:anywhere}
ol,.findings{padding-left:22px;overflow-wrap:anywhere}.findings .error b{color:var(--bad)}.findings .warning b{color:var(--warn)}
.findings em{color:var(--dim);font-style:normal}
pre{background:var(--card);padding:10px 12px;border-radius:6px;overflow-x:auto;font-size:13px}
figure{margin:0}figcaption{color:var(--dim);font-size:13px}.keys{margin:4px 0;display:flex;flex-wrap:wrap;gap:2px 16px}
.key{display:inline-flex;align-items:center;gap:5px;color:var(--ink)}.key svg{width:11px;height:11px}
figure .scroll svg{width:100%;min-width:620px;height:auto;display:block}
svg text{fill:var(--ink);font-size:12px}.grid,.lane{stroke:var(--line);stroke-width:1}.mark{stroke:var(--ink);stroke-width:1.4}
.front{fill:none;stroke:var(--dim);stroke-width:1.5;stroke-dasharray:5 4}.dot{stroke:var(--bg);stroke-width:1.2}
.bar{stroke-width:1.5;opacity:.55}.area{opacity:.5}
.c0{fill:var(--c0);stroke:var(--c0)}.c1{fill:var(--c1);stroke:var(--c1)}.c2{fill:var(--c2);stroke:var(--c2)}
.c3{fill:var(--c3);stroke:var(--c3)}.c4{fill:var(--c4);stroke:var(--c4)}.c5{fill:var(--c5);stroke:var(--c5)}
.c6{fill:var(--c6);stroke:var(--c6)}.c7{fill:var(--c7);stroke:var(--c7)}.dot{stroke:var(--bg)}
@media (max-width:520px){dl{grid-template-columns:1fr}dt{margin-top:6px}th,td{padding:5px 7px}h1{font-size:22px}}
@media print{:root{--bg:#fff;--card:#fff;--ink:#000;--dim:#444;--line:#bbb;--mark:#eee}main{max-width:none;padding:0}
body{font-size:11px}table{font-size:9.5px}th,td{padding:2px 4px}.scroll{overflow:visible}section,figure{break-inside:avoid-page}
tr{break-inside:avoid}h2{break-after:avoid}figure .scroll svg{min-width:0}}
"""
