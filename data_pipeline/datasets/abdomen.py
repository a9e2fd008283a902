"""Names of abdominal organs by the ids of the datasets that label them."""

# BTCV, and Learn2Reg's AbdomenCTCT made of it. Learn2Reg's own list names 12 the left
# adrenal gland; in its label maps 12 lies beside the right kidney (2), as in BTCV's.
BTCV = (
    (1, "spleen"),
    (2, "kidney_right"),
    (3, "kidney_left"),
    (4, "gallbladder"),
    (5, "esophagus"),
    (6, "liver"),
    (7, "stomach"),
    (8, "aorta"),
    (9, "inferior_vena_cava"),
    (10, "portal_vein_and_splenic_vein"),
    (11, "pancreas"),
    (12, "adrenal_gland_right"),
    (13, "adrenal_gland_left"),
)
AMOS = (
    (1, "spleen"),
    (2, "kidney_right"),
    (3, "kidney_left"),
    (4, "gallbladder"),
    (5, "esophagus"),
    (6, "liver"),
    (7, "stomach"),
    (8, "aorta"),
    (9, "inferior_vena_cava"),
    (10, "pancreas"),
    (11, "adrenal_gland_right"),
    (12, "adrenal_gland_left"),
    (13, "duodenum"),
    (14, "urinary_bladder"),
    (15, "prostate_or_uterus"),
)
FLARE = (
    (1, "liver"),
    (2, "kidney_right"),
    (3, "spleen"),
    (4, "pancreas"),
    (5, "aorta"),
    (6, "inferior_vena_cava"),
    (7, "adrenal_gland_right"),
    (8, "adrenal_gland_left"),
    (9, "gallbladder"),
    (10, "esophagus"),
    (11, "stomach"),
    (12, "duodenum"),
    (13, "kidney_left"),
)
