"""Looking into a run: records, previews, sheets of attention, sweeps over settings, and the doctor of a machine."""
