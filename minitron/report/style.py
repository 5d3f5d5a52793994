"""The page's style sheet. Three colours carry meaning throughout: teacher grey, pruned orange, student blue."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#171b21;--soft:#59626e;--rule:#dfe3e8;--track:#e9edf1;--panel:#f5f7f9;
--teacher:#68717d;--pruned:#c65d13;--student:#1a68b3;--other:#a3acb7;--term0:#0f8a7b;--term1:#8d4fb0;--term2:#a8792a;
--q0:#f0f4f8;--q1:#dce7f1;--q2:#c3d8ea;--q3:#a3c4e0;--q4:#7dabd2;--q5:#568fc1;--q6:#3673ac;--q7:#1f5891;--q8:#0d3c6e;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
@media screen and (prefers-color-scheme:dark){:root{--paper:#11151a;--ink:#e6eaef;--soft:#98a2af;--rule:#2b323b;--track:#262d36;--panel:#191f26;
--teacher:#a0a9b5;--pruned:#ee9350;--student:#62aef2;--other:#5f6a77;--term0:#45c2b0;--term1:#c795e6;--term2:#d9b15e;
--q0:#1b232c;--q1:#1c2f42;--q2:#1d3c59;--q3:#204b72;--q4:#2a5f8f;--q5:#3b78ac;--q6:#5894c8;--q7:#82b4e0;--q8:#bbdcf8}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0 auto;max-width:1168px;padding:48px 40px 56px;background:var(--paper);color:var(--ink);
font:16px/1.5 var(--sans);font-variant-numeric:tabular-nums}
h1,h2,h3,h4,p,dl,dd,figure,ul{margin:0;padding:0}
h1{font-size:30px;line-height:1.2;font-weight:650;letter-spacing:-.015em;overflow-wrap:anywhere;text-wrap:balance}
h2{font-size:21px;line-height:1.3;font-weight:650;letter-spacing:-.01em}
h3{font-size:15px;font-weight:650}
h4{font-size:13px;font-weight:600;margin:18px 0 2px}
h3.part{font-size:18px;padding-bottom:6px;border-bottom:1px solid var(--rule)}
ul{list-style:none}
a{color:inherit}
code,pre{font-family:var(--mono);font-size:.86em;overflow-wrap:anywhere}
:focus-visible{outline:2px solid var(--student);outline-offset:3px;border-radius:2px}

header .meta{margin-top:4px;color:var(--soft);font-size:14px}
header .story{margin-top:22px;max-width:46em;font-size:19px;line-height:1.5;text-wrap:pretty}
.facts{display:grid;grid-template-columns:1.75fr 1.5fr 1.15fr .9fr .9fr;margin-top:32px;border-top:2px solid var(--ink)}
.fact{padding:14px 20px 4px 0}
.fact+.fact{padding-left:20px;border-left:1px solid var(--rule)}
.fact dt{font-size:13px;color:var(--soft)}
.fact dd{font-size:29px;line-height:1.3;font-weight:620;letter-spacing:-.02em;white-space:nowrap}
.fact .was,.fact .to{color:var(--soft);font-weight:400}
.fact dd.below{font-size:13px;line-height:1.45;font-weight:400;letter-spacing:0;color:var(--soft);white-space:normal;margin-top:4px}
.fact .share{margin:3px 0 6px}
.steps{display:flex;flex-wrap:wrap;gap:0 12px}
.steps b{color:var(--ink);font-weight:600}
header .remark{margin-top:8px}
.damage{margin-top:30px}

nav{display:flex;flex-wrap:wrap;gap:4px 22px;margin-top:34px;padding:11px 0;border:solid var(--rule);border-width:1px 0;font-size:14px}
nav a{color:var(--soft);text-decoration:none}
nav a:hover{color:var(--ink);text-decoration:underline}

section{display:grid;grid-template-columns:216px minmax(0,1fr);gap:0 40px;padding-top:56px;scroll-margin-top:-20px}
.aside p{margin-top:6px;color:var(--soft);font-size:14px;overflow-wrap:anywhere;text-wrap:pretty}
.content>*+*{margin-top:34px}
.content>details+details,.content>.remark+.remark{margin-top:0}
figure{break-inside:avoid}
figcaption{margin-bottom:12px}
figcaption p{color:var(--soft);font-size:14px;max-width:62ch}
.remark{color:var(--soft);font-size:14px;max-width:68ch}
ul.remark{list-style:disc;padding-left:1.2em}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;margin:-4px 0 10px;font-size:13px;color:var(--soft)}
.key{display:inline-block;margin-right:7px;vertical-align:middle;background:var(--c)}
.key.box{width:10px;height:10px;border-radius:2px;vertical-align:0}
.key.dot{width:8px;height:8px;border-radius:50%;vertical-align:1px}
.key.line{width:18px;height:0;border-top:2.5px solid var(--c);background:none}
.key.dashed{border-top-style:dashed}
.key.faint{opacity:.4}
.pair,.small{display:grid;gap:26px 32px;align-items:start}
.pair{grid-template-columns:repeat(auto-fit,minmax(min(310px,100%),1fr))}
.small{grid-template-columns:repeat(auto-fit,minmax(min(200px,100%),1fr))}
.small figcaption{margin-bottom:0}
.small h3{font-size:13px;font-weight:600}

.scroll{overflow-x:auto}
table{width:100%;border-collapse:collapse;font-size:14px}
th,td{padding:7px 12px 7px 0;text-align:left;font-weight:400;vertical-align:middle;border-bottom:1px solid var(--rule)}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--soft);font-size:13px;border-bottom-color:var(--soft);vertical-align:bottom}
td.n,th.n{text-align:right;white-space:nowrap}
.nowrap{white-space:nowrap}
td.bar{width:34%;padding-left:6px}
th.code,td.code{white-space:nowrap}
th.code span,th.code b{font-family:var(--mono);font-size:.9em}
thead th.code{font-family:inherit}
b.same,span.same{font-weight:400;color:var(--soft)}
tfoot th,tfoot td{font-weight:650;border-bottom:0;border-top:1px solid var(--ink)}
.ink{color:var(--c)}
.range{color:var(--soft);font-size:.86em}
.share{display:block;height:8px;border-radius:2px;background:var(--track);overflow:hidden}
.fill{display:block;height:100%;min-width:2px;background:var(--c)}
td .fill.teacher{opacity:.75}
.hbars{font-size:14px}
.hbars li{display:grid;grid-template-columns:84px minmax(0,1fr) 178px;gap:14px;align-items:center;padding:4px 0}
.hbars .share{height:20px;background:none}
.hbars .value{color:var(--soft)}
.hbars .value b{color:var(--ink)}

dl:not(.facts){display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:14px 24px;font-size:14px}
dl:not(.facts) dt{color:var(--soft);font-size:13px}
dl:not(.facts) dd{overflow-wrap:anywhere}
pre{margin:0;padding:12px 14px;background:var(--panel);border-radius:4px;white-space:pre-wrap}
details{border-top:1px solid var(--rule);padding:9px 0}
details:last-child{border-bottom:1px solid var(--rule)}
summary{cursor:pointer;font-size:14px}
summary b{font-weight:600;overflow-wrap:anywhere}
summary span{margin-left:14px;color:var(--soft);font-size:13px}
details td.code{white-space:normal}
details th:first-child{width:42%}
details td.code,details th.code{font-size:13px}
footer{margin-top:64px;padding-top:12px;border-top:1px solid var(--rule);color:var(--soft);font-size:13px}
"""

STYLE += """
.teacher{--c:var(--teacher)}.pruned{--c:var(--pruned)}.student{--c:var(--student)}.other{--c:var(--other)}
.term0{--c:var(--term0)}.term1{--c:var(--term1)}.term2{--c:var(--term2)}.sparse,.export{--c:var(--term0)}
svg{display:block;width:100%;height:auto;overflow:visible;font-family:var(--sans)}
svg.mini{width:96px;height:16px}
.narrow{display:none}
.tick{font-size:12px;fill:var(--soft)}
.axis{font-size:12px;fill:var(--soft)}
.note{font-size:13px;fill:var(--soft)}
.end,.stop{font-weight:600;fill:var(--c)}
.end{font-size:12px}
.stop{font-size:15px}
.end.other{fill:var(--soft)}
.grid{stroke:var(--rule);stroke-width:1}
.base{stroke:var(--soft);stroke-width:1}
.lead{stroke:var(--soft);stroke-width:1}
.rule{stroke:var(--pruned);stroke-width:1.5;stroke-dasharray:4 3}
.cut{stroke:var(--pruned);stroke-width:2}
.ln{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.ln.faint{opacity:.35;stroke-width:1}
.ln.dashed{stroke-dasharray:5 5}
.ln.other{stroke-width:1.4}
.ln.strong{stroke-width:2.8}
.dot{fill:var(--c);stroke:var(--paper);stroke-width:1.5}
.ring{fill:var(--paper);stroke:var(--c);stroke-width:1.6}
.hover{fill:transparent}
.hover:hover{fill:var(--ink);fill-opacity:.25}
.bar{fill:var(--c)}
.bar:hover{opacity:.75}
.span{stroke:var(--c);stroke-width:6}
.span.pruned{opacity:.55}
.gone{filter:grayscale(1);opacity:.4}
.lost{fill:var(--pruned);font-weight:650}
.cross{fill:none;stroke:var(--pruned);stroke-width:1.6}
.q0{fill:var(--q0)}.q1{fill:var(--q1)}.q2{fill:var(--q2)}.q3{fill:var(--q3)}.q4{fill:var(--q4)}.q5{fill:var(--q5)}
.q6{fill:var(--q6)}.q7{fill:var(--q7)}.q8{fill:var(--q8)}

@media (max-width:1040px){
body{padding:36px 32px 48px}
section{grid-template-columns:minmax(0,1fr);gap:18px;padding-top:48px}
.aside p{max-width:62ch}
.roomy{display:none}
.facts{grid-template-columns:repeat(6,1fr)}
.fact{grid-column:span 2}
.fact:nth-child(-n+2){grid-column:span 3;padding-bottom:12px}
.fact:nth-child(n+3){border-top:1px solid var(--rule)}
.fact:nth-child(3){padding-left:0;border-left:0}
}
@media screen and (max-width:640px){
body{padding:24px 20px 40px}
h1{font-size:25px}
header .story{font-size:17px;margin-top:16px}
.wide,.opt{display:none!important}
.narrow{display:block}
.facts{grid-template-columns:1fr 1fr;margin-top:22px}
.fact,.fact:nth-child(-n+2){grid-column:span 1;padding:12px 12px 10px 0}
.fact:first-child{grid-column:span 2}
.fact+.fact{padding-left:0;border-left:0;border-top:1px solid var(--rule)}
.fact:nth-child(2n+3){padding-left:14px;border-left:1px solid var(--rule)}
.fact dd{font-size:25px}
.damage{margin-top:20px}
nav{gap:6px 16px;margin-top:22px}
section{padding-top:42px}
th,td{padding-right:10px}
td.bar{width:20%}
.hbars li{grid-template-columns:60px minmax(0,1fr);gap:2px 10px}
.hbars .value{grid-column:2}
summary span{display:block;margin-left:1.1em}
.err{display:block;color:var(--soft);font-size:.86em}
}
@media print{
@page{margin:14mm}
:root{color-scheme:light}
body{max-width:none;padding:0;font-size:11pt;-webkit-print-color-adjust:exact;print-color-adjust:exact}
nav{display:none}
section{padding-top:28px}
h2,h3,h4,figcaption,thead{break-after:avoid}
tr,.fact,.hbars,.content>.scroll{break-inside:avoid}
.aside{break-after:avoid}
tfoot{display:table-row-group}
.scroll{overflow:visible}
}
"""
