"""From a StepPlan to tensors and back: preparing batches and running the model on a device."""
