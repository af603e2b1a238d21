import time, torch, ctypes, os
torch.set_grad_enabled(False)
from taut.ops.linear import linear
import torch.nn.functional as F
g=ctypes.CDLL(None)
a=ctypes.cast(g.GOMP_parallel,ctypes.c_void_p).value
for l in open("/proc/self/maps"):
    lo,hi=[int(v,16) for v in l.split()[0].split("-")]
    if lo<=a<hi: print("GOMP from",l.split()[-1])
print({l.split()[-1] for l in open("/proc/self/maps") if "omp" in l.split()[-1]}, torch.get_num_threads(), os.sched_getaffinity(0))
n,k=8192,4096
for dt in (torch.float32,torch.bfloat16):
    ws=[torch.randn(n,k).to(dt) for _ in range(8)]; x=torch.randn(1,k).to(dt)
    B=ws[0].nbytes/1e9
    def med(f,N=24):
        ts=[]
        for i in range(N):
            t=time.perf_counter(); f(ws[i%8]); ts.append(time.perf_counter()-t)
        ts.sort(); return round(B/ts[0],1),round(B/ts[N//2],1)
    lin=lambda w: linear(x,w)
    lin(ws[0])
    print(dt,"taut alone",med(lin),"torch alone",med(lambda w:F.linear(x,w)))
    ts={"taut":[],"torch":[]}
    for i in range(24):
        for nm,f in (("taut",lin),("torch",lambda w:F.linear(x,w))):
            w=ws[(i+(4 if nm=="torch" else 0))%8]
            t=time.perf_counter(); f(w); ts[nm].append(time.perf_counter()-t)
    print("  interleaved",{nm:(round(B/min(v),1),round(B/sorted(v)[12],1)) for nm,v in ts.items()})
