"""Own data in five lines: from frames with energies and forces to a better potential.

    python examples/own_data.py [FRAMES.xyz] [RUN]

Without a file it takes the DFT frames in the package, 50 of 2-aminoethanol at PBE0/def2-SVP.
"""

import sys

import forcetune

frames = sys.argv[1] if len(sys.argv) > 1 else forcetune.demo_file("train")
folder = sys.argv[2] if len(sys.argv) > 2 else "run"

run = forcetune.fit(frames, model="mini", method="mmea", valid=0.2, epochs=20, out=folder)
print(f"forces, validation frames: {run.before['valid'].forces_mae_mev_per_ang:.0f} meV/Å before", end=", ")
print(f"{run.after['valid'].forces_mae_mev_per_ang:.0f} after; look at {run.folder / 'report.html'}")
