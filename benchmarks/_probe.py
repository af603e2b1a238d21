import time, numpy as np, torch, numba as nb
from numba import njit
from numba.core import cgutils
from llvmlite import ir
from taut.ops._numba.scalar import *
from taut.ops._numba import simd
from taut.ops._numba.simd import dots
from taut.ops._numba.parallel import shared
from taut.ops._numba.read import read
o=dict(JIT); o.pop("cache")
@intrinsic
def prefetch(tx,a):
    def cg(ctx,b,sig,args):
        P=ir.IntType(8).as_pointer(); I=ir.IntType(32)
        f=cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(),[P,I,I,I]),"llvm.prefetch.p0")
        b.call(f,[b.inttoptr(args[0],P),I(0),I(3),I(1)]); return ctx.get_dummy_value()
    return nb.types.void(nb.types.int64),cg
@njit(**o)
def A(part,parts,w,x,n,k,out):
    a,b=span(n,part,parts)
    for r in range(a,b): dots(nb.uint16(0),1,w+r*k*2,x,4*k,k,out+4*r)
@njit(**o)
def B(part,parts,w,x,n,k,out):
    a,b=span(n,part,parts); X=array(x,k,np.float32(0)); O=array(out,n,np.float32(0)); W=array(w,(n,k),np.uint16(0))
    for r in range(a,b):
        row=W[r]; s=nb.float32(0)
        for i in range(k): s+=up(row[i])*X[i]
        O[r]=s
@njit(**o)
def C(part,parts,w,x,n,k,out):
    a,b=span(n,part,parts)
    for r in range(a,b):
        for c in range(0,2*k,64): prefetch(w+(r+1)*k*2+c)
        dots(nb.uint16(0),1,w+r*k*2,x,4*k,k,out+4*r)
@njit(**o)
def D(part,parts,w,x,n,k,out):
    a,b=span(n,part,parts); X=array(x,k,np.float32(0)); O=array(out,n,np.float32(0)); W=array(w,(n,k),np.uint16(0))
    for r in range(a,b-3,4):
        r0=W[r];r1=W[r+1];r2=W[r+2];r3=W[r+3]
        s0=nb.float32(0);s1=nb.float32(0);s2=nb.float32(0);s3=nb.float32(0)
        for i in range(k):
            s0+=up(r0[i])*X[i];s1+=up(r1[i])*X[i];s2+=up(r2[i])*X[i];s3+=up(r3[i])*X[i]
        O[r]=s0;O[r+1]=s1;O[r+2]=s2;O[r+3]=s3
@njit(**o)
def E_(part,parts,w,x,n,k,out):
    a,b=span(n,part,parts)
    for r in range(a,b):
        for c in range(0,k,512):
            p=w+r*k*2+2*c+8192
            for q in range(0,1024,64): prefetch(p+q)
            dots(nb.uint16(0),1,w+r*k*2+2*c,x+4*c,4*k,512,out+4*r)
fs=dict(A=A,B=B,C=C,D=D,E=E_)
runs={}
for nm,f in fs.items():
    sh=shared(f)
    @njit(**o)
    def run(w,x,n,k,out,parts): sh(parts,(w,x,n,k,out))
    runs[nm]=run
n,k=8192,4096
ws=[torch.randn(n,k).bfloat16() for _ in range(10)]; x=torch.randn(k); out=torch.zeros(n)
fw=torch.randn(10*n*k//2)
for parts in (1,2,4):
    res={nm:[] for nm in runs}; rd=[]; small=[]
    for it in range(20):
        for j,(nm,f) in enumerate(runs.items()):
            w=ws[(it*7+j)%10]
            f(w.data_ptr(),x.data_ptr(),n,k,out.data_ptr(),parts)if it==0 else None
            t=time.perf_counter(); f(w.data_ptr(),x.data_ptr(),n,k,out.data_ptr(),parts); res[nm].append(time.perf_counter()-t)
        o_=(it%10)*n*k//2
        read(fw.data_ptr(),64,parts)
        t=time.perf_counter(); read(fw.data_ptr()+4*o_,n*k//2,parts); rd.append(time.perf_counter()-t)
    B_=n*k*2/1e9
    print(parts,{nm:(round(B_/min(v),1),round(B_/sorted(v)[10],1)) for nm,v in res.items()},"read",round(B_/min(rd),1),round(B_/sorted(rd)[10],1))
    w=ws[0]
    print("  in cache (64 rows)",{nm:round(64*k*2/1e9/min([ (lambda t0:(f(w.data_ptr(),x.data_ptr(),64,k,out.data_ptr(),1),time.perf_counter()-t0)[1])(time.perf_counter()) for _ in range(200)]),1) for nm,f in runs.items()})
