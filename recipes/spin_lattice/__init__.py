"""A spin–lattice model of bcc iron with known answers, and data of it for the magnetic layer."""
