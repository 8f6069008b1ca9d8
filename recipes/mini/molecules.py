"""The molecules of the pretraining data, written by hand over the functional groups of organic chemistry.

All are neutral and closed-shell, of H, C, N, O, F, S and Cl. SMILES are kept in the canonical form of RDKit 2026.9, so
that the split, a hash of the SMILES, needs no RDKit and does not move with its version.
"""

from __future__ import annotations

import hashlib
from typing import Final

FINE_TUNING: Final = ("NCCO",)
"""Molecules of the fine-tuning data: a model that knew them would make the demonstration a sham."""

BENCHMARKS: Final = (
    "CC(=O)C=C(C)O",
    "CC(=O)CC(C)=O",
    "CC(=O)Nc1ccc(O)cc1",
    "CC(=O)Oc1ccccc1C(=O)O",
    "CCO",
    "Cc1ccccc1",
    "Nc1cccnc1OCc1ccccc1",
    "O=C(O)c1ccccc1O",
    "O=CCC=O",
    "O=c1cc[nH]c(=O)[nH]1",
    "c1ccc(N=Nc2ccccc2)cc1",
    "c1ccc2ccccc2c1",
    "c1ccccc1",
)
"""Molecules of rMD17, AcAc and 3BPA, left out for the same reason."""

HELD_OUT_SHARE: Final = 0.08
"""Share of the molecules that no training frame shows."""

ELEMENTS: Final = (1, 6, 7, 8, 9, 16, 17)
"""Atomic numbers that occur."""

GROUPS: Final[dict[str, str]] = {
    "small molecules": """
        O N C [H][H] C#N O=C=O [C-]#[O+] S OO NN F Cl FF ClCl N#N C=O O=CO CO CN CF CCl CS NO N=C=O O=S=O CNC OF
        OCl NCl FCl S=C=S O=C=S C=S
    """,
    "alkanes": """
        CC CCC CCCC CC(C)C CCCCC CCC(C)C CC(C)(C)C CCCCCC CCCC(C)C CCC(C)CC CC(C)C(C)C CCC(C)(C)C CCCCCCC
        CCC(CC)CC
    """,
    "cycloalkanes and strained rings": """
        C1CC1 C1CCC1 C1CCCC1 C1CCCCC1 CC1CC1 CC1(C)CC1 C1CC2CC12 C1C2CC1C2 C1CC2CCC1C2 C1CC12CC2 CC1CCCC1
        CC1CCCCC1 C1CCC2CC2C1 C1C2CC12 C1=CC1 C1=CCC1 C=C1CC1 C1CC2CCC12
    """,
    "alkenes and dienes": """
        C=C C=CC C=CCC CC=CC C=C(C)C C=CC=C C=C=C CC=C(C)C CC(C)=C(C)C C=CCCC=C C=CC(=C)C C1=CCCC1 C1=CCC=C1
        C1=CCCCC1 C1=CCC=CC1 C1=CCCC=C1 C=CC=CC=C C=C=CC C=CC(C)C C1=CC2CCC1C2 C1=CC=CCC=C1
    """,
    "alkynes": """
        C#C C#CC C#CCC CC#CC C#CC=C C#CC#C C#CCC#C C#CC(C)C C#CC1CC1 CC#CCC C#CCO C#CCN C#CC=O C#Cc1ccccc1
        CC#CC(=O)O
    """,
    "alcohols and diols": """
        CCCO CC(C)O CCCCO CCC(C)O CC(C)(C)O C=CCO OCCO OCC(O)CO CC(O)CO OCCCO OC1CC1 OC1CCCC1 OC1CCCCC1 OCC1CC1
        OC1CCC1 CC(O)C(C)O OCC#CCO C=CC(C)O OCCCCO C=CC(O)CO CC(C)CO
    """,
    "ethers, acetals and epoxides": """
        COC CCOC CCOCC COCOC COCCO COCCOC C1CO1 CC1CO1 C1COC1 C1CCOC1 C1CCOCC1 C1COCCO1 C1COCO1 C=COC C=COC=C
        C1=COCC1 C1=CCOCC1 OCC1CO1 C1CC2OC2C1 COC(C)C COC(C)(C)C C1OCOCO1 COOC C#CCOC C1COCCOC1 CC1OC1C
    """,
    "aldehydes": """
        CC=O CCC=O CC(C)C=O C=CC=O CC=CC=O O=CC=O O=CCO O=CCCC=O CC(=O)C=O O=CC1CC1 CCCC=O CC#CC=O O=CC(O)CO
        O=Cc1ccccc1 CC(C)=CC=O O=CCc1ccccc1
    """,
    "ketones": """
        CC(C)=O CCC(C)=O CCC(=O)CC C=CC(C)=O CC(=O)C(C)=O O=C1CCC1 O=C1CCCC1 O=C1CCCCC1 CC(=O)CO COCC(C)=O
        O=C1CC1 O=C1C=CCC1 O=C1C=CCCC1 CC(=O)C1CC1 CC(=O)c1ccccc1 O=C1C=CC(=O)C=C1 C=C=O CC=C=O C#CC(C)=O
        CC(=O)CCC(C)=O O=c1cccccc1 CC(=O)CC(C)O
    """,
    "acids and anhydrides": """
        CC(=O)O CCC(=O)O C=CC(=O)O CC(C)C(=O)O O=C(O)CO CC(O)C(=O)O CC(=O)C(=O)O O=C(O)C(=O)O O=C(O)CC(=O)O
        O=C(O)C=CC(=O)O O=C(O)CCC(=O)O C#CC(=O)O O=C(O)c1ccccc1 CC(=O)OC(C)=O O=C1CCC(=O)O1 O=C1C=CC(=O)O1
        O=CC(=O)O O=C(O)C1CC1 O=C(O)O CC(=O)OO O=C(O)CF O=C(O)C(F)(F)F O=C(O)CCl O=COC=O
    """,
    "esters, lactones and carbonates": """
        COC=O CCOC=O COC(C)=O CCOC(C)=O CCC(=O)OC C=CC(=O)OC C=COC(C)=O O=C1CCO1 O=C1CCCO1 O=C1CCCCO1 COC(=O)OC
        O=C1OCCO1 COC(=O)C(=O)OC COC(=O)CC#N COC(=O)CO O=C1C=CCO1 COC(=O)c1ccccc1 CC(=O)Oc1ccccc1 COC(=O)C1CC1
        CC(=O)OC(C)C O=c1cccco1 COC(=O)C=C(C)C
    """,
    "amides, imides and ureas": """
        NC=O CNC=O CN(C)C=O CC(N)=O CNC(C)=O CC(=O)N(C)C CCC(N)=O C=CC(N)=O NC(N)=O CNC(N)=O CNC(=O)NC O=C1CCCN1
        O=C1CCN1 O=C1CCCCN1 O=C1CCC(=O)N1 O=C1C=CC(=O)N1 NC(=O)C(N)=O NC(=O)CC(N)=O O=C1NCCN1 O=C1CNCCN1
        NC(=O)CO COC(N)=O CC(=O)NO NC(=O)c1ccccc1 CC(=O)Nc1ccccc1 O=C1COC(=O)N1 CC(=O)NC(C)=O O=C1CNC(=O)N1
        CN1CCCC1=O O=CNC=O
    """,
    "amines and hydrazines": """
        CCN CN(C)C CCNC CCCN CC(C)N CC(C)(C)N CCNCC CCN(C)C NCCN CNCCN NCCCN CNCCNC C1CN1 CC1CN1 CN1CC1 C1CNC1
        C1CCNC1 C1CCNCC1 C1CNCCN1 C1COCCN1 CN1CCCC1 CN1CCOCC1 C=CCN NC1CC1 NC1CCCCC1 CNN CNNC CN(C)N NCc1ccccc1
        C1CN2CCC1CC2 C1CN2CCN1CC2 NCC1CC1 C#CCN(C)C NCCCO CNCCO CN(C)CCO CC(O)CN CC(N)CO OCCNCCO COCCN NC1CCCC1
        C1CNNC1
    """,
    "amino acids and their kin": """
        NCC(=O)O CC(N)C(=O)O NCCC(=O)O NC(CO)C(=O)O NC(CS)C(=O)O CC(C)C(N)C(=O)O NCC(N)=O CNCC(=O)O CC(N)C(N)=O
        NCC(=O)NCC(=O)O O=C(O)C1CCCN1 CC(=O)NCC(=O)O NC(CC(=O)O)C(=O)O CC(=O)NCC(N)=O COC(=O)CN NCC=O
        CC(=O)NC(C)C(N)=O NCCS CNC(=O)C(C)NC(C)=O
    """,
    "nitriles and isocyanides": """
        CC#N CCC#N CC(C)C#N C=CC#N N#CC#N N#CCC#N N#CCCC#N N#CCO N#CCN N#CC1CC1 N#Cc1ccccc1 N#CC=CC#N [C-]#[N+]C
        N#CC#CC#N N#CN CN(C)C#N N#CC=O CC(C)(O)C#N N#CC(N)=O CC=CC#N
    """,
    "imines, oximes, amidines and azo compounds": """
        C=N CC=N CC(C)=N CC=NC C=NC C=NO CC=NO CC(C)=NO N=CN CC(=N)N CN=CN(C)C N=C(N)N CN=NC N=N C=NN CC=NN
        C1=NCCN1 C1=NCCC1 C1=NCCO1 CC(C)=NN N=Cc1ccccc1 CC1=NCCO1 N=C=N CN=C=O CN=C=NC CN=[N+]=[N-] C=[N+]=[N-]
        CCN=[N+]=[N-] C1=NCN1 CN=C(N)N
    """,
    "nitro compounds, nitrites and nitroso compounds": """
        C[N+](=O)[O-] CC[N+](=O)[O-] C=C[N+](=O)[O-] O=[N+]([O-])c1ccccc1 CON=O CN=O CO[N+](=O)[O-]
        O=[N+]([O-])CCO CC(C)[N+](=O)[O-] CN(N)N=O CN(C)N=O O=[N+]([O-])O O=NO C[N+](C)(C)[O-]
        Nc1ccc([N+](=O)[O-])cc1 CN[N+](=O)[O-] O=[N+]([O-])C1CC1
    """,
    "aromatics": """
        Cc1ccccc1C Cc1cccc(C)c1 CCc1ccccc1 C=Cc1ccccc1 Oc1ccccc1 Nc1ccccc1 COc1ccccc1 Oc1ccccc1O Oc1ccc(O)cc1
        Nc1ccccc1N Nc1cccc(O)c1 CNc1ccccc1 CN(C)c1ccccc1 OCc1ccccc1 Cc1ccc(O)cc1 O=Cc1ccccc1O COc1ccc(C=O)cc1
        c1ccc2c(c1)CCC2 c1ccc2c(c1)CO2 C1=Cc2ccccc21 c1ccc2c(c1)OCO2 c1ccc2cccc-2cc1 NCCc1ccc(O)cc1
        Cc1ccc(C#N)cc1
    """,
    "five-membered heteroaromatics": """
        c1cc[nH]c1 c1ccoc1 c1ccsc1 c1c[nH]cn1 c1cn[nH]c1 c1cocn1 c1cscn1 c1cnoc1 c1cnsc1 c1nc[nH]n1 c1nnc[nH]1
        c1nnn[nH]1 c1nnco1 c1nncs1 c1ncon1 Cn1cccc1 Cn1ccnc1 Cc1ccco1 Cc1ccc[nH]1 Cc1cccs1 Cc1cnc[nH]1
        O=Cc1ccco1 OCc1ccco1 O=Cc1ccc[nH]1 Nc1nccs1 Nc1ncc[nH]1 c1ccc2[nH]ccc2c1 c1ccc2occc2c1 c1ccc2[nH]cnc2c1
        c1ccc2[nH]ncc2c1 c1ccc2scnc2c1 c1ccc2ocnc2c1 Cc1cc(C)on1 NCCc1cnc[nH]1 O=C(O)c1ccco1 c1ncc2nc[nH]c2n1
        c1ccn2ccnc2c1 c1cnon1 c1cnsn1
    """,
    "six-membered heteroaromatics": """
        c1ccncc1 c1cnccn1 c1cncnc1 c1ccnnc1 c1ncncn1 Cc1ccccn1 Cc1ccncc1 Nc1ccccn1 Nc1ccncc1 Oc1ccccn1
        O=c1cccc[nH]1 O=c1cc[nH]cc1 Oc1cccnc1 Nc1ncccn1 Nc1ccnc(=O)[nH]1 Cc1c[nH]c(=O)[nH]c1=O O=c1cc[nH]cn1
        Nc1ncnc2nc[nH]c12 Nc1nc2nc[nH]c2c(=O)[nH]1 c1ccc2ncccc2c1 c1ccc2cnccc2c1 c1ccc2nccnc2c1 COc1ccncc1
        N#Cc1ccncc1 O=Cc1ccncc1 O=C(O)c1cccnc1 NC(=O)c1cccnc1 O=c1ccocc1 Nc1nc(N)nc(N)n1 Nc1cnccn1
        c1cnc2[nH]ccc2c1 O=c1nccc[nH]1 Cn1ccc(=O)[nH]c1=O c1cnnnc1
    """,
    "thiols, sulfides, disulfides and thiocarbonyls": """
        CCS CC(C)S CSC CCSC CCSCC CSSC OCCS SCCS C1CS1 C1CSC1 C1CCSC1 C1CCSCC1 C1CSCCO1 C=CSC C=CCS CC(C)=S
        CC(N)=S NC(N)=S CC(=O)S CSC(C)=O N#CS CSC#N CN=C=S Sc1ccccc1 CSc1ccccc1 CSCCO CSCC=O O=CCS SS CSS CSCSC
        CSCC#N C1CSCS1 NC=S
    """,
    "sulfoxides, sulfones and sulfonamides": """
        CS(C)=O CCS(C)=O CS(C)(=O)=O C=CS(C)(=O)=O CS(N)(=O)=O CS(=O)(=O)O CNS(C)(=O)=O O=S1CCCC1 O=S1(=O)CCCC1
        O=S1(=O)CC=CC1 COS(C)=O CS(=O)O COS(=O)OC CS(=O)(=O)F CS(=O)(=O)Cl NS(N)(=O)=O CS(=O)(=O)CC#N
        CS(=O)(=O)c1ccccc1 O=S(=O)(O)O COS(C)(=O)=O CN(C)S(C)(=O)=O CS(=O)(=O)CO
    """,
    "fluorides": """
        CCF FCF FC(F)F FC(F)(F)F C=CF C=C(F)F CC(F)F CC(F)(F)F FCCF OCCF NCCF OCC(F)(F)F FC=CF FC(F)=C(F)F
        Fc1ccccc1 Cc1ccc(F)cc1 Oc1ccc(F)cc1 Fc1ccccc1F FC(F)(F)c1ccccc1 CC(F)C(=O)O O=CF CC(=O)F N#CCF C#CF
        CC(C)F FC1CC1 Fc1ccncc1 CC(=O)C(F)(F)F O=CCF COC(F)F NC(=O)CF O=c1[nH]cc(F)c(=O)[nH]1 FC(F)OC(F)F
        CSC(F)(F)F
    """,
    "chlorides": """
        CCCl ClCCl ClC(Cl)Cl ClC(Cl)(Cl)Cl C=CCl C=C(Cl)Cl CC(Cl)Cl ClCCCl OCCCl NCCCl ClC=CCl Clc1ccccc1
        Cc1ccc(Cl)cc1 Oc1ccc(Cl)cc1 Clc1ccccc1Cl CC(=O)Cl O=CCl CC(C)Cl CC(C)(C)Cl ClCC1CO1 C=CCCl C#CCCl
        Clc1ccccn1 N#CCCl CC(Cl)C(=O)O O=CCCl CC(=O)CCl FCCl FC(Cl)Cl FC(F)(F)Cl FC(F)Cl Nc1ccc(Cl)cc1 ClC1CC1
        Clc1cccs1 COCCl CSCCl O=C(Cl)Cl Fc1ccc(Cl)cc1 CNCl
    """,
    "hydroxylamines, peroxides and mixed functions": """
        CON CNO CN(C)O COO CCOO CC(C)OO CNOC CCON COCO NCO NCCOC=O O=C(CO)CO CC(=O)C(C)O NC(CO)CO OCC(O)C(O)CO
        OC1COCC1O O=C1CC(O)CO1 OC1CCCO1 NC1COC1 OC1CNC1 OC1CCOC1 CC1C=CC(=O)O1 O=C1CCNC1 COC=CC=O NC=CC=O
        CN(C)C=CC=O COc1cc[nH]n1 C=CO C=C(C)O C=CN N#CO CC(=O)NCCO
    """,
}
"""Canonical SMILES by functional group, separated by blanks; a molecule stands under one group only."""


def molecules() -> tuple[str, ...]:
    """All molecules, in the order of the groups."""
    return tuple(smiles for text in GROUPS.values() for smiles in text.split())


def is_held_out(smiles: str) -> bool:
    """Whether a molecule, by its canonical SMILES, is kept from training."""
    digest = hashlib.sha256(smiles.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def training_molecules() -> tuple[str, ...]:
    """The molecules whose frames are trained on and validated with."""
    return tuple(smiles for smiles in molecules() if not is_held_out(smiles))


def held_out_molecules() -> tuple[str, ...]:
    """The molecules of which no frame is trained on."""
    return tuple(smiles for smiles in molecules() if is_held_out(smiles))
