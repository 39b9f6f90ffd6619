"""Training objectives: draw a level, mix, ask the model, compare with the prediction's target."""
