"""The study of transfer_expert.py: transferred experts beside their controls on other base models, cell by cell."""
